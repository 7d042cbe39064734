"""`python -m train fit`: what it learns, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT, python

from ercbatch.errors import UsageError
from train.recipe import Recipe, Source, read_recipe


def test_training_learns_and_describes_its_run(trained: Path) -> None:
    run = json.loads((trained / "run.json").read_text())
    losses = [epoch["loss"] for epoch in run["epochs"]]
    assert losses[-1] < losses[0]
    assert run["kept"] in (1, 2, 3)
    assert run["epochs"][-1]["impact_loss"] > 0
    assert (trained / "adapter" / "adapter_model.safetensors").exists()
    assert run["recipe"]["alpha"] == 0.1


def test_recipe_defaults_are_the_papers() -> None:
    recipe = Recipe(base="x", train=(Source("y", "meld"),))
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout) == (16, 16, 0.05)
    assert (recipe.learning_rate, recipe.warmup, recipe.clip, recipe.seed) == (2e-4, 0.1, 1.0, 42)
    assert (recipe.betas, recipe.weight_decay, recipe.alpha) == ((0.9, 0.95), 0.0, 0.1)
    assert (recipe.window.turns, recipe.epochs, recipe.same_label) == (12, 6, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate = 1", "unknown key 'rate'"),
        ("[[train]]\npath='x'\nlabels='moods'", "no label set 'moods'"),
        ("method = 'half'", "choose lora or full"),
        ("base = ", "cannot read the recipe"),
        ("demonstrations = 0.5", "need an encoder"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    base = "" if text.startswith("base") else "base = 'x'\n"
    train = "" if "[[" in text else "\n[[train]]\npath = 'x'\nlabels = 'meld'\n"
    path.write_text(base + text + train)
    with pytest.raises(UsageError, match=words):
        read_recipe(path)


def test_labels_outside_the_set_are_refused_before_training(bert: Path, tmp_path: Path) -> None:
    data, recipe = tmp_path / "d.jsonl", tmp_path / "recipe.toml"
    data.write_text('{"utterances": [{"text": "a", "label": "sleepy"}]}\n')
    recipe.write_text(
        f"base = {json.dumps(str(bert))}\n[[train]]\npath = 'd.jsonl'\nlabels = 'meld'\n"
    )
    done = python("-m", "train", "fit", recipe, "-o", tmp_path / "run")
    assert done.returncode == 4
    assert "d.jsonl, line 1" in done.stderr
    assert "sleepy" in done.stderr
    data.write_text((EXAMPLES / "group_chat.jsonl").read_text())
    done = python("-m", "train", "fit", recipe, "-o", tmp_path / "run")
    assert "no utterance has a `label`" in done.stderr


def test_a_config_that_asks_to_run_code_is_refused(bert: Path, tmp_path: Path) -> None:
    from ercbatch.torch_model import load_causal_lm

    for key in ("auto_map", "_attn_implementation_internal"):
        value = json.loads((bert / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**value, key: "evil"}))
        with pytest.raises(UsageError, match="asks to run code"):
            load_causal_lm(str(tmp_path))


def test_the_runtime_imports_neither_train_nor_export() -> None:
    for path in (ROOT / "ercbatch").glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in ("train", "export"), path
