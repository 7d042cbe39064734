"""Exported graphs: the same sums wherever a token stands, and no more than is needed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ARCHITECTURES, CHAT, write_model
from onnx import NodeProto, TensorProto, helper

from benchmarks.packed import packed as label_packed
from benchmarks.packed import separate
from ercbatch import Labeler
from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.errors import BundleError
from ercbatch.inputs.records import read_dialogues
from ercbatch.prompts.packs import Pack, graft, join
from ercbatch.prompts.tree import Question, Read, Segment, Task, lay_out, visible
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.onnx_scorer import feed, tiles_of
from ercbatch.scoring.packed_model import PackedModel, collate
from ercbatch.scoring.scorer import StateScorer
from ercbatch.scoring.tiles import KEYS, cut, levels
from export.graph.attention import sum_softmax_in_double
from export.graph.fusions import fuse_rotations
from export.graph.nodes import Graph
from export.graph.tiles import TILES
from export.model import trace_scorer, traced_attention

pytestmark = pytest.mark.transformers


def test_an_int8_answer_is_that_of_its_separate_prompt(bundle_folder: Path) -> None:
    """To the last bits: a sum in another order would move int8 activations by whole steps."""
    labeler = Labeler(str(bundle_folder), demonstrations=0)
    chance = random.Random(3)
    words = "it is gone thank you where my door late again happy fridge no !".split()
    turns = [Utterance(" ".join(chance.choices(words, k=9)), "AB"[t % 2]) for t in range(90)]
    dialogues = [Dialogue(tuple(turns[at : at + 9])) for at in range(0, len(turns), 9)]
    together, _ = label_packed(labeler, dialogues)
    alone, _ = separate(labeler, dialogues)
    temperature = labeler.engine.temperature
    assert len(together) == len(turns)
    for key, row in together.items():
        other = alone[key] ** (1 / temperature)
        assert np.abs(other / other.sum() - row).max() < 1e-6


def test_an_answer_read_alone_is_the_same_to_the_last_bit() -> None:
    """A product of one row has a kernel of its own, which adds up in another order."""
    engine = Labeler("mini", demonstrations=0).engine
    scorer = engine.scorer
    assert isinstance(scorer, StateScorer)
    given = list(engine.packs(dialogue for _, dialogue in read_dialogues(CHAT)))
    for pack in given:
        together = scorer.states(pack)
        for read, state in zip(pack.reads, together, strict=True):
            (alone,) = scorer.states(replace(pack, reads=(read,)))
            assert np.array_equal(alone, state)


UNTILED = {"bloom", "gpt2"}
"""Whose traced attention has another form."""
WHOLE = {"bloom", "falcon", "gpt2", "gpt_neox", "phi3"}
"""Whose queries come out of one product with keys and values, which all tokens need."""


@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if k not in ("mamba", "mpt")])
def test_a_graph_computes_less_and_the_same(kind: str, tmp_path: Path) -> None:
    """Rewritten graphs compute the states of the model.

    They compute the last layer only where one is read, and attention only where a tile sees.
    """
    base = str(write_model(tmp_path, kind))
    model, _ = load_causal_lm(base, attn_implementation=traced_attention(base))
    packed = PackedModel(model.eval())
    pack = some_pack(random.Random(5))
    with torch.no_grad():
        expected = packed(*collate([pack])).numpy()
    graph = trace_scorer(packed)
    assert (f"{KEYS}_0" not in graph.users) == (kind in UNTILED)
    sum_softmax_in_double(graph)
    assert "Softmax" not in {node.op_type for node in graph.nodes}
    with pytest.raises(ValueError, match="no attention"):
        sum_softmax_in_double(graph)
    fuse_rotations(graph)
    session = onnxruntime.InferenceSession(graph.finish().SerializeToString())
    assert tiles_of(tmp_path, session) == TILES
    states = session.run(None, feed(pack, TILES))[0]
    assert np.abs(states - expected).max() < 2e-5
    # Rows meet in attention alone: what is gathered goes no deeper than the last one's inputs.
    gathered = [n for n in graph.nodes if n.op_type == "Gather" and n.input[1] == "reads"]
    products = [n for n in graph.nodes if graph.product(n)]
    before = {n.output[0] for n in gathered}
    narrow_products = sum(bool(before & ancestors(graph, n)) for n in products)
    assert narrow_products >= (3 if kind in WHOLE else 4)


def some_pack(chance: random.Random) -> Pack:
    """Three trees with the same beginning, which have questions, one of them in two steps."""
    head = chance.choices(range(50), k=5)
    trees = []
    for owner, size in enumerate((30, 9, 17)):
        trunk = Segment(head + chance.choices(range(50), k=size))
        for at in range(6, size, 7):
            question = Question(Task.EMOTION, at)
            below = Segment(chance.choices(range(50), k=2), read=Read(question, 1))
            branch = Segment(chance.choices(range(50), k=4), [(3, below)], Read(question, 0))
            trunk.children.append((at, branch))
        trees.append((owner, lay_out(trunk)))
    return graft(trees, len(head))


def ancestors(graph: Graph, node: NodeProto) -> set[str]:
    """All values that a node is computed from."""
    result: set[str] = set()
    waiting = list(node.input)
    while waiting:
        name = waiting.pop()
        if name not in result:
            result.add(name)
            waiting += graph.producers[name].input if name in graph.producers else []
    return result


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_tiles_hold_every_key_that_a_row_sees(count: int) -> None:
    chance = random.Random(count)
    for pack in (some_pack(chance), join([(0, lay_out(Segment([1])))])):
        tiles = cut(pack.ends, count)
        assert sorted(tiles.order.tolist()) == list(range(len(pack)))
        assert len(tiles.row_counts) == len(tiles.key_counts) == count
        assert tiles.row_counts.sum() == len(pack)
        assert tiles.key_counts.sum() == len(tiles.keys)
        assert (tiles.key_counts > 0).all()
        assert len(pack) == 1 or 1 not in tiles.row_counts
        sees = visible(pack.ends)[np.ix_(tiles.order, tiles.order)]
        rows = np.split(sees, tiles.row_counts.cumsum()[:-1])
        keys = np.split(tiles.keys, tiles.key_counts.cumsum()[:-1])
        for some, own in zip(rows, keys, strict=True):
            needed = np.flatnonzero(some.any(axis=0))
            assert set(needed.tolist()) <= set(own.tolist())
            assert (np.diff(own) > 0).all()
    dense = len(some_pack(chance)) ** 2
    computed = [(t.row_counts * t.key_counts).sum() for t in (cut(some_pack(chance).ends, count),)]
    assert count == 1 or computed[0] < 0.75 * dense


def test_a_deep_tree_is_cut_by_its_levels() -> None:
    leaf = Segment([4], [(0, Segment([5]))])
    tree = lay_out(Segment([1, 2, 3], [(0, Segment([6, 7], [(0, leaf)])), (1, Segment([8]))]))
    assert tree.tokens.tolist() == [1, 6, 4, 5, 7, 2, 8, 3]
    assert levels(tree.ends).tolist() == [1, 2, 3, 3, 2, 1, 2, 1]
    assert tree.tokens[cut(tree.ends, 1).order].tolist() == [1, 2, 3, 6, 7, 8, 4, 5]


@pytest.mark.parametrize("size", [0, 65, "tiles"])
def test_a_graph_with_odd_tiles_is_refused(size: int | str, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("Identity", ["row_counts"], ["y"])
    inputs = [value("row_counts", TensorProto.INT64, [size])]
    graph = helper.make_graph([node], "odd", inputs, [value("y", TensorProto.INT64, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    with pytest.raises(BundleError, match="not 1 to 64"):
        tiles_of(tmp_path / "model.onnx", session)
