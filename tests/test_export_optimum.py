"""The standard graph: what other tools read, and labels as a pack's, prompt by prompt."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, EXAMPLES, UNTRAINED, cli, export_bundle, write_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import Bundle, open_bundle, write_bundle
from ercbatch.bundle.manifest import BundleInfo
from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.errors import BundleError, MissingExtraError, UsageError
from ercbatch.prompts.packs import Pack, join
from ercbatch.prompts.templates import template
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.prompts.tree import Question, Renderer, Task, Tree, Window
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.optimum_scorer import OptimumScorer, batches, separate
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.torch_scorer import TorchScorer
from export.graph.trace import trace
from export.model import trace_scorer
from export.optimum_form import export_optimum

pytestmark = pytest.mark.transformers

Writer = Callable[[Path, Path], None]
LABELS = ("neutral", "joyful", "sad", "sadder", "joyless")
NOT_EXPORTED = ("bert", "mamba")
"""What optimum has no text generation for."""
ACCEPTED = [kind for kind in ARCHITECTURES if kind not in (*NOT_EXPORTED, "mpt")]
"""MPT is not for packs: see tests/test_export_architectures.py."""


def need_optimum() -> None:
    """Skip where it is not installed, or transformers is too new for it."""
    pytest.importorskip("optimum.exporters.onnx.convert", exc_type=ImportError)


class Standard(nn.Module):
    """A causal language model with the inputs and outputs of the standard graph."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor, *past: Tensor) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        length, whole = input_ids.shape[1], mask.shape[1]
        index = torch.arange(whole)
        sees = index <= index[whole - length :, None]
        sees = sees[None, None] & (mask[:, None, None] > 0)
        return self.model(
            input_ids=input_ids,
            attention_mask=torch.where(sees, 0.0, torch.finfo(torch.float32).min),
            position_ids=positions,
            past_key_values=cache,
        ).logits


def write_traced(checkpoint: Path, folder: Path) -> None:
    """A standard graph without optimum, which transformers 5 is too new for."""
    model = load_causal_lm(str(checkpoint), attn_implementation="eager")[0].eval()
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    names = [
        f"past_key_values.{layer}.{part}"
        for layer in range(config.num_hidden_layers)
        for part in ("key", "value")
    ]
    batch = {0: "batch_size"}
    ids = torch.ones((2, 5), dtype=torch.long)
    graph = trace(
        Standard(model),
        (
            ids,
            torch.ones((2, 8), dtype=torch.long),
            torch.arange(3, 8).repeat(2, 1),
            *(torch.randn(2, heads, 3, size) for _ in names),
        ),
        {
            "input_ids": {**batch, 1: "sequence_length"},
            "attention_mask": {**batch, 1: "past_sequence_length + sequence_length"},
            "position_ids": {**batch, 1: "sequence_length"},
            **{name: {**batch, 2: "past_sequence_length"} for name in names},
        },
        {"logits": {**batch, 1: "sequence_length"}},
    )
    graph.save(folder / manifest.MODEL)


@pytest.fixture(params=["traced", "optimum"])
def write_standard(request: pytest.FixtureRequest) -> Writer:
    """What writes a checkpoint's standard graph into a folder."""
    if request.param == "traced":
        return write_traced
    need_optimum()
    return export_optimum


TURNS = [Utterance(f"it is {n} , not my door !", "AB"[n % 2]) for n in range(9)]
DIALOGUE = Dialogue(tuple(TURNS))


def renderers(tokenizer: SegmentTokenizer) -> list[Renderer]:
    """With windows that slide, and labels that part late."""
    windows = (Window(3, 2), Window(2, 3, future=2))
    return [Renderer(tokenizer, template("compact"), window, LABELS) for window in windows]


def trees(renderer: Renderer) -> list[Tree]:
    """All tasks, with and without demonstrations."""
    asked = [Question(Task.EMOTION, t, (("where is it", "sad"),)[: t % 2]) for t in range(9)]
    asked += [Question(task, t) for task in (Task.IMPACT, Task.SPEAKER) for t in range(1, 9)]
    return renderer.trees(DIALOGUE, asked)


def whole(renderer: Renderer) -> Pack:
    return join(list(enumerate(trees(renderer))))


def check_scorer(checkpoint: Path, folder: Path) -> None:
    """See that the graph in `folder` gives a pack's answers as its checkpoint does."""
    model, tokenizer = load_causal_lm(str(checkpoint))
    # Every 7th row: ids of the head need not begin at 0, nor follow each other.
    original = TorchScorer(PackedModel(model.eval()), range(3, 420, 7))
    scorer = OptimumScorer(folder / manifest.MODEL, original.head, 1)
    for renderer in renderers(tokenizer):
        pack = whole(renderer)
        result = scorer.logits(pack)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, original.logits(pack), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen2"])
def test_a_traced_graph_gives_the_logits_of_packs(kind: str, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model", kind)
    write_traced(checkpoint, tmp_path)
    check_scorer(checkpoint, tmp_path)


@pytest.mark.parametrize("kind", ACCEPTED)
def test_optimums_graph_gives_the_logits_of_packs(kind: str, tmp_path: Path) -> None:
    """Of whichever of `position_ids` and sliding windows an architecture has."""
    need_optimum()
    checkpoint = write_model(tmp_path / "model", kind)
    export_optimum(checkpoint, tmp_path)
    check_scorer(checkpoint, tmp_path)


def test_an_answer_is_the_same_alone_and_amid_others(
    write_standard: Writer, llama: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_causal_lm(str(llama))
    head = PackedModel(model).answer_head(range(50))
    write_standard(llama, tmp_path)
    scorer = OptimumScorer(tmp_path / manifest.MODEL, head, 1)
    renderer = renderers(tokenizer)[0]
    amid = scorer.logits(whole(renderer))
    alone = np.concatenate([scorer.logits(join([(0, tree)])) for tree in trees(renderer)])
    np.testing.assert_allclose(amid, alone, atol=1e-6, rtol=1e-6)


def test_a_pack_is_taken_apart_into_its_separate_prompts(llama: Path) -> None:
    for renderer in renderers(load_causal_lm(str(llama))[1]):
        pack = whole(renderer)
        assert [prompt.tolist() for prompt in separate(pack)] == [
            renderer.separate_prompt(DIALOGUE, read.question, read.choice)
            for _, _, read in pack.reads
        ]


@given(st.lists(st.integers(1, 700), max_size=40))
def test_batches_hold_every_prompt_once_and_not_too_many_tokens(lengths: list[int]) -> None:
    made = list(batches(lengths, 512))
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    for batch in made:
        assert lengths[batch[-1]] == max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * lengths[batch[-1]] <= 512


def test_the_graph_of_packs_is_refused(llama: Path, tmp_path: Path) -> None:
    model = PackedModel(load_causal_lm(str(llama), attn_implementation="eager")[0])
    trace_scorer(model).save(tmp_path / manifest.MODEL)
    with pytest.raises(BundleError, match=r"no text-generation graph .*\(inputs tokens, "):
        OptimumScorer(tmp_path / manifest.MODEL, model.answer_head([1]), 1)


@pytest.fixture(scope="module")
def packed(llama: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A float32 bundle of a base as it is."""
    folder = tmp_path_factory.mktemp("bundles") / "packed"
    examples = ("--encoder", encoder_folder, "--examples", EXAMPLES / "my_examples.jsonl")
    done = export_bundle(llama, folder, *UNTRAINED, *examples, "--demos", "2", "--quantize", "fp32")
    assert done.returncode == 0, done.stderr
    return open_bundle(folder)


def test_optimum_bundle_gives_the_labels_of_the_packed_one(
    write_standard: Writer, llama: Path, packed: Bundle, tmp_path: Path
) -> None:
    def fill(part: Path) -> BundleInfo:
        for name in packed.info.files.keys() - {manifest.MODEL}:
            shutil.copyfile(packed.path(name), part / name)
        write_standard(llama, part)
        return replace(packed.info, form="optimum")

    folder = tmp_path / "standard"
    write_bundle(folder, fill)
    written = open_bundle(folder).info.files
    for name, digest in packed.info.files.items():
        assert (written[name] == digest) == (name != manifest.MODEL)
    labelled = []
    for bundle in (packed.folder, folder):
        done = cli(
            *("label", EXAMPLES / "group_chat.jsonl", "--bundle", bundle, "--scores", "--quiet")
        )
        assert done.returncode == 0, done.stderr
        labelled.append([json.loads(line) for line in done.stdout.splitlines()])
    for one, other in zip(*labelled, strict=True):
        for turn, before in zip(one["utterances"], other["utterances"], strict=True):
            assert turn["scores"] == pytest.approx(before["scores"], abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "qwen2"])
def test_optimum_reads_the_folder(kind: str, tmp_path: Path) -> None:
    need_optimum()
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint, folder = write_model(tmp_path / "model", kind), tmp_path / "standard"
    folder.mkdir()
    load_causal_lm(str(checkpoint))[1].save(folder / manifest.TOKENIZER)  # as a bundle has it
    own = (folder / manifest.TOKENIZER).read_bytes()
    export_optimum(checkpoint, folder)
    assert (folder / manifest.TOKENIZER).read_bytes() == own
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.onnx",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    result = ORTModelForCausalLM.from_pretrained(folder)
    asked = AutoTokenizer.from_pretrained(folder)("where is my door ?", return_tensors="pt")
    asked.pop("token_type_ids", None)
    with torch.no_grad():
        wanted = model(**asked).logits
    torch.testing.assert_close(result(**asked).logits, wanted, atol=1e-4, rtol=1e-4)
    # With the past of each step fed to the next.
    written = (m.generate(**asked, max_new_tokens=12, do_sample=False) for m in (result, model))
    assert torch.equal(*written)


@pytest.mark.parametrize("kind", NOT_EXPORTED)
def test_an_architecture_without_a_standard_graph_is_refused(kind: str, tmp_path: Path) -> None:
    need_optimum()
    with pytest.raises(UsageError, match=f"exports no {kind} model .* --quantize fp32"):
        export_optimum(write_model(tmp_path, kind), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_checkpoint_that_asks_for_code_is_refused(name: str, tmp_path: Path) -> None:
    need_optimum()
    checkpoint, folder = write_model(tmp_path / "model", "gpt2"), tmp_path / "standard"
    folder.mkdir()
    path = checkpoint / name
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoTokenizer": ["mine.Tokenizer", None], "AutoConfig": "mine.Config"}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"{name} has 'auto_map'.*: refused"):
        export_optimum(checkpoint, folder)
    assert not any(folder.iterdir())


def test_a_checkpoint_without_safetensors_is_refused(tmp_path: Path) -> None:
    need_optimum()
    checkpoint = write_model(tmp_path, "gpt2")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"has no model\.safetensors"):
        export_optimum(checkpoint, tmp_path)


def test_without_optimum_a_sentence_says_what_to_install(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install '.\[optimum\]'"):
        export_optimum(llama, tmp_path)
