"""Any causal language model: packed as alone, with adapters on its attention, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ACCEPTED, CHAT, REFUSED, cli, write_model, write_recipe
from helpers.commands import python

from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.errors import UsageError
from ercbatch.prompts.packs import join
from ercbatch.prompts.templates import template
from ercbatch.prompts.tree import Question, Renderer, Task, Window
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.packed_model import PackedModel, collate
from train.adapter import add_lora
from train.recipe import Recipe
from train.sources import Source

pytestmark = pytest.mark.transformers

LABELS = ("neutral", "joyful", "sad", "sadder", "joyless")
ADAPTED = {
    "bert": {"query", "key", "value"},
    "bloom": {"query_key_value"},
    "falcon": {"query_key_value"},
    "gpt2": {"c_attn"},
    "gpt_neox": {"query_key_value"},
    "phi3": {"qkv_proj"},
}
"""Where the projections have other names than Llama's."""


@pytest.mark.parametrize("kind", ACCEPTED)
@pytest.mark.parametrize("attention", [None, pytest.param("eager", marks=pytest.mark.slow)])
def test_a_packed_model_gives_the_logits_of_separate_prompts(
    kind: str, attention: str | None, tmp_path: Path
) -> None:
    base = str(write_model(tmp_path, kind))
    model, tokenizer = load_causal_lm(base, attn_implementation=attention)
    plain, _ = load_causal_lm(base)
    packed_model = PackedModel(model.eval())
    packed_model.check_packing()
    turns = [Utterance(f"it is {n} , not my door !", "AB"[n % 2]) for n in range(9)]
    dialogue = Dialogue(tuple(turns))
    asked = [Question(Task.EMOTION, t, (("where is it", "sad"),)[: t % 2]) for t in range(9)]
    asked += [Question(task, t) for task in (Task.IMPACT, Task.SPEAKER) for t in range(1, 9)]
    for window in (Window(3, 2), Window(2, 3, future=2)):
        renderer = Renderer(tokenizer, template("compact"), window, LABELS)
        trees = list(enumerate(renderer.trees(dialogue, asked)))
        assert max(max(tree.positions) for _, tree in trees) > 40  # sliding windows do slide
        # Two packs of unequal length side by side: padding must not show either.
        packs = [join(trees[:1] * 2), join(trees)]
        with torch.no_grad():
            states = packed_model(*collate(packs))
            ours = packed_model.logits(states, torch.arange(plain.config.vocab_size))
            for row, (_, _, read) in zip(ours, packs[0].reads + packs[1].reads, strict=True):
                ids = renderer.separate_prompt(dialogue, read.question, read.choice)
                alone = plain(input_ids=torch.tensor([ids])).logits[0, -1]
                torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ACCEPTED)
def test_adapters_go_on_the_attention_projections(kind: str, tmp_path: Path) -> None:
    model, _ = load_causal_lm(str(write_model(tmp_path, kind)))
    packed = PackedModel(model)
    add_lora(packed, Recipe("", (Source("", "meld"),)))
    names = [name.split(".") for name, p in packed.named_parameters() if p.requires_grad]
    expected = ADAPTED.get(kind, {"q_proj", "k_proj", "v_proj"})
    assert {name[name.index("lora_A") - 1] for name in names if "lora_A" in name} == expected
    layers = model.config.get_text_config().num_hidden_layers
    assert len(names) == 2 * layers * len(expected)


@pytest.mark.parametrize("kind", REFUSED)
def test_model_that_cannot_be_packed_is_refused_before_training(kind: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, write_model(tmp_path / "base", kind))
    done = python("-m", "train", "fit", path, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert f"a {kind} model cannot be run over packs" in done.stderr
    assert not any((tmp_path / "run").iterdir())


def test_a_model_in_half_precision_is_checked_too(tmp_path: Path) -> None:
    for kind in ("bloom", "mistral"):
        base = str(write_model(tmp_path / kind, kind))
        PackedModel(load_causal_lm(base, dtype=torch.bfloat16)[0]).check_packing()
    base = str(write_model(tmp_path / "mpt", "mpt"))
    with pytest.raises(UsageError, match="a mpt model"):
        PackedModel(load_causal_lm(base, dtype=torch.bfloat16)[0]).check_packing()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bloom", "gemma3_text", "gpt2"])
def test_other_architectures_are_bundled(kind: str, encoder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    path = write_recipe(tmp_path, write_model(tmp_path / "base", kind), tasks=["emotion"])
    done = python("-m", "train", "fit", path, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = python(
        *("-m", "export", "bundle", tmp_path / "run", "-o", folder, "--name", kind),
        *("--encoder", encoder_folder, "--examples", CHAT.parent / "my_examples.jsonl"),
        *("--licence", "MIT", "--quantize", "fp32"),
    )
    assert done.returncode == 0, done.stderr
    assert "agreement 100.0%" in done.stdout
    done = cli("label", CHAT, "--bundle", folder, "-o", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
