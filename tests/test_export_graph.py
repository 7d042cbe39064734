"""Exported graphs: what the model computes, of any architecture, in one file or two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ACCEPTED, write_model
from helpers.packs import pack
from onnx import TensorProto, helper, numpy_helper

from ercbatch.bundle import manifest
from ercbatch.prompts.packs import join
from ercbatch.prompts.tree import Question, Read, Segment, Task, lay_out
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.onnx_scorer import OnnxScorer
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.torch_scorer import TorchScorer
from export.forms import write_graph
from export.graph.nodes import Graph, data_file
from export.model import trace_scorer, traced_attention

pytestmark = pytest.mark.transformers

ROTATED = (
    "falcon",
    "gemma",
    "gemma3_text",
    "gpt_neox",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
)


def packed(folder: Path, kind: str) -> PackedModel:
    base = str(write_model(folder / "base", kind))
    model, _ = load_causal_lm(base, attn_implementation=traced_attention(base))
    with torch.no_grad():
        # As wide as they are drawn, they would multiply a rounding from layer to layer, as the
        # matrices of a trained model don't.
        for parameter in model.base_model.parameters():
            parameter *= 0.5 if parameter.ndim == 2 else 1
    return PackedModel(model.eval())


def error(result: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(result - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("kind", ACCEPTED)
def test_every_form_computes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    model = packed(tmp_path, kind)
    asked = pack(0, 40)
    wanted = TorchScorer(model, [1, 2]).states(asked)
    samples = [pack(seed, 60) for seed in range(1, 4)]
    for form, most in (("fp32", 1e-4), ("int8", 0.15), ("int4", 0.6)):
        folder = tmp_path / form
        folder.mkdir()
        write_graph(model, folder, form, "avx2", samples)
        scorer = OnnxScorer(folder / manifest.MODEL, model.answer_head([1, 2]), 1)
        assert error(scorer.states(asked), wanted) < most
        operators = {node.op_type for node in onnx.load(folder / manifest.MODEL).graph.node}
        assert ("RotaryEmbedding" in operators) == (kind in ROTATED)
        assert ("MatMulIntegerToFloat" in operators) == (form == "int8")
        assert ("MatMulNBits" in operators) == (form == "int4")


def test_a_pack_may_be_longer_than_the_positions_of_its_model(tmp_path: Path) -> None:
    """GPT-2's eager attention has a table of its own, which ends there."""
    model = packed(tmp_path, "gpt2")
    long = join([(n, tree) for n in range(30) for tree in [lay_out(_segment(n))]])
    assert len(long) > model.model.config.n_positions
    write_graph(model, tmp_path, "fp32", "avx2", [])
    scorer = OnnxScorer(tmp_path / manifest.MODEL, model.answer_head([1]), 1)
    assert error(scorer.states(long), TorchScorer(model, [1]).states(long)) < 1e-4


def _segment(seed: int) -> Segment:
    words = np.random.default_rng(seed).integers(5, 400, 50).tolist()
    return Segment(words, read=Read(Question(Task.EMOTION, 0), 0))


def test_a_trace_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """In half precision too: the graph is float32, and reads each weight when it needs it."""
    base = str(write_model(tmp_path / "base", "llama"))
    model, _ = load_causal_lm(base, attn_implementation="eager", dtype=torch.bfloat16)
    model = PackedModel(model.train())
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    graph = trace_scorer(model)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    assert not graph.model.graph.initializer
    types = {t.data_type for t in graph.finish().graph.initializer}
    assert types <= {TensorProto.FLOAT, TensorProto.INT64}
    assert not any(module.training for module in model.modules())


def test_a_large_model_keeps_its_weights_beside_its_graph(tmp_path: Path) -> None:
    assert data_file(tmp_path, 1e9) is None
    assert data_file(tmp_path, 2e9) == tmp_path / manifest.MODEL_DATA
    model = packed(tmp_path, "llama")
    asked = pack(0, 40)
    trace_scorer(model, tmp_path / manifest.MODEL_DATA).save(tmp_path / manifest.MODEL)
    size = sum(p.numel() for p in model.model.parameters()) * 4
    assert (tmp_path / manifest.MODEL).stat().st_size < size / 4
    head = model.answer_head([1, 2])
    scorer = OnnxScorer(tmp_path / manifest.MODEL, head, 1, [manifest.MODEL_DATA])
    assert error(scorer.states(asked), TorchScorer(model, [1, 2]).states(asked)) < 1e-4


def test_only_what_is_read_is_kept() -> None:
    """Copies of a constant are the constant; one turned once serves all who read it so."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    nodes = [
        helper.make_node("Identity", ["w"], ["copy"]),
        helper.make_node("Transpose", ["copy"], ["one"], perm=[1, 0]),
        helper.make_node("Transpose", ["w"], ["other"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "one"], ["a"]),
        helper.make_node("MatMul", ["x", "other"], ["b"]),
        helper.make_node("Neg", ["a"], ["unread"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    floats = TensorProto.FLOAT
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("x", floats, ["rows", 3])],
            [helper.make_tensor_value_info("y", floats, ["rows", 2])],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight, "unused")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    result = Graph(model).finish().graph
    assert [node.op_type for node in result.node] == ["MatMul", "MatMul", "Add"]
    (kept,) = result.initializer
    assert np.array_equal(numpy_helper.to_array(kept), weight.T)
