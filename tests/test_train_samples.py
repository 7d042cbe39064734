"""`python -m train fit`: what it learns, keeps and refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, write_model
from helpers.commands import python
from helpers.gguf_file import write_gguf
from safetensors.torch import load_file, save_file

from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.errors import InputError, UsageError
from ercbatch.labels import label_set
from ercbatch.prompts.tree import Task, Window
from ercbatch.scoring.checkpoints import load_causal_lm
from train.datasets import Dataset, Scene, read_dataset, without_overlap
from train.dropout import dropout_settings
from train.model import load_trainable
from train.recipe import Recipe, read_recipe
from train.run import load_run
from train.samples import Sampler
from train.sources import Source, source_names

pytestmark = pytest.mark.transformers


def test_training_learns_and_describes_its_run(trained: Path) -> None:
    run = json.loads((trained / "run.json").read_text())
    losses = [epoch["loss"] for epoch in run["epochs"][1:]]  # the first is another task's
    assert losses[-1] < losses[0]
    assert run["kept"] in (2, 3, 4)
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
        ("method = 'half'", "choose from lora, full"),
        ("base = ", "cannot read the recipe"),
        ("demonstrations = 0.5", "need an encoder"),
        ("alpha = 'much'", "alpha: Input should be a valid number"),
        ("[[train]]\npath='x'\nlabels='meld'\nfraction='all'", "train.0.fraction: Input"),
        ("[train]\npath='x'", r"write \[\[train\]\]"),
        ("window = 3", r"write \[window\]"),
        ("train = 3", r"write \[\[train\]\]"),
        ("base = 3", "base: Input should be a valid string"),
        ("alpha = true", "alpha: Input should be a valid number"),
        ("same_label = 'no'", "same_label: Input should be a valid boolean"),
        ("betas = [0.9, 1.5]", "betas must be in"),
        ("seed = -1", r"seed must be in \[0, 4294967295\]"),
        ("seed = 4294967296", r"seed must be in \[0, 4294967295\]"),
        ("lora_dropout = 2.0", r"lora_dropout must be in \[0, 1\)"),
        ("clip = 0", r"clip must be in \(0, inf\)"),
        ("bank_per_label = 0", r"bank_per_label must be in \[1, inf\)"),
        ("[window]\nfuture = 2", "later_turns"),
        ("[window]\nturn = 3", "unknown key 'turn' for .window.: did you mean turns"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    base = "" if text.startswith("base") else "base = 'x'\n"
    train = "" if "train" in text else "\n[[train]]\npath = 'x'\nlabels = 'meld'\n"
    path.write_text(base + text + train)
    with pytest.raises(UsageError, match=words):
        read_recipe(path)


def test_settings_stand_in_place_of_the_recipes_values(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        "base = 'x'\nalpha = 0.3\n[window]\nturns = 5\n[[train]]\npath = 'x'\nlabels = 'meld'\n"
    )
    changed = read_recipe(
        path, ["alpha=0.5", "window.stride=2", "tasks=['emotion']", "template = plain"], seed=7
    )
    assert (changed.alpha, changed.window, changed.tasks, changed.template, changed.seed) == (
        0.5,
        Window(5, 2),
        ("emotion",),
        "plain",
        7,
    )
    for setting, words in (("alpha", "give KEY=VALUE"), ("beta=1", "unknown key 'beta'")):
        with pytest.raises(UsageError, match=words):
            read_recipe(path, [setting])


@pytest.mark.slow
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


def test_data_without_dialogues_or_labels_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    for text, words in (("", "no dialogue in it"), ('{"utterances": [{"text": "a"}]}', "`label`")):
        data.write_text(text)
        with pytest.raises(InputError, match=words):
            read_dataset(Source(str(data), "meld"))


def test_dialogues_that_share_a_long_line_with_validation_are_left_out() -> None:
    def dataset(*texts: str) -> Dataset:
        scenes = tuple(Scene(Dialogue((Utterance(text),)), (None,)) for text in texts)
        return Dataset(Source("x", "meld"), label_set("meld"), scenes)

    held_out = dataset("We found the parcel, at last!", "Oh no.")
    ours = dataset("WE FOUND THE PARCEL AT LAST", "Oh no.", "We lost the parcel, at last!")
    kept = without_overlap(ours, [held_out], 20)
    assert [scene.dialogue.utterances[0].text for scene in kept.scenes] == [
        "Oh no.",  # short lines are anybody's
        "We lost the parcel, at last!",
    ]


def test_trained_weights_are_float32_whatever_the_base_has(bert: Path, tmp_path: Path) -> None:
    model, _ = load_causal_lm(str(bert), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bert / name, tmp_path / name)
    for method, bfloat16 in (("full", True), ("full", False), ("lora", True), ("lora", False)):
        recipe = Recipe(str(tmp_path), (Source("", "meld"),), method=method, window=Window(2, 2))
        packed, _, _ = load_trainable(recipe, torch.device("cpu"), bfloat16=bfloat16)
        trained = {p.dtype for p in packed.parameters() if p.requires_grad}
        frozen = {p.dtype for p in packed.parameters() if not p.requires_grad}
        assert trained == {torch.float32}
        if method == "lora":
            assert frozen == {torch.bfloat16 if bfloat16 else torch.float32}


def test_datasets_get_the_shortest_source_names() -> None:
    def names(*paths: str) -> list[str]:
        return source_names([Source(path, "meld") for path in paths])

    assert names("a/one.jsonl", "b/two.jsonl") == ["one", "two"]
    assert names("a/dev.jsonl", "b/dev.jsonl") == ["a/dev", "b/dev"]
    assert len(set(names("a/dev.jsonl", "a/dev.json"))) == 2
    with pytest.raises(UsageError, match=r"dev\.jsonl, meld is named twice"):
        names("dev.jsonl", "dev.jsonl")


def test_dropout_goes_by_the_names_of_the_architecture(checkpoint: Path) -> None:
    recipe = Recipe(
        base=str(checkpoint), train=(Source("y", "meld"),), dropout=0.0, attention_dropout=0.25
    )
    settings = dropout_settings(recipe)
    model, _ = load_causal_lm(str(checkpoint), **settings)
    assert 0.25 in settings.values()
    assert all(getattr(model.config, name) == value for name, value in settings.items())
    if model.config.model_type == "llama":
        with pytest.raises(UsageError, match="a llama model has no dropout"):
            dropout_settings(dataclasses.replace(recipe, dropout=0.1))


@pytest.mark.slow
def test_a_full_run_is_a_base_for_the_next(bert: Path, tmp_path: Path) -> None:
    data = json.dumps(str(EXAMPLES / "labelled_chat.jsonl"))
    tables = f"[[train]]\npath = {data}\nlabels = 'meld'\n[[valid]]\npath = {data}\nlabels = 'meld'"
    for name, base in (("one", bert), ("two", tmp_path / "one" / "model")):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(
            f"base = {json.dumps(str(base))}\nmethod = 'full'\ntemplate = 'compact'\n"
            f"epochs = 1\nlearning_rate = 1e-3\n{tables}\n"
        )
        done = python("-m", "train", "fit", recipe, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("one", "two"))
    assert two["epochs"][0]["loss"] < one["epochs"][0]["loss"]
    assert one["controls"] == two["controls"]


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_folds_teach_the_dialogues_that_each_left_out(bert: Path, tmp_path: Path) -> None:
    data = EXAMPLES / "labelled_chat.jsonl"

    def write_recipe(name: str, table: str) -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(
            f"base = {json.dumps(str(bert))}\nmethod = 'full'\ntemplate = 'compact'\n"
            f"epochs = 1\nlearning_rate = 1e-3\n[[train]]\n{table}\n"
        )
        return path

    recipe = write_recipe("fold", f"path = {json.dumps(str(data))}\nlabels = 'meld'")
    for fold in ("0/2", "1/2"):
        run = tmp_path / fold[0]
        done = python("-m", "train", "fit", recipe, "-o", run, "--fold", fold)
        assert done.returncode == 0, done.stderr
    done = python("-m", "train", "fit", recipe, "-o", tmp_path / "x", "--fold", "2/2")
    assert done.returncode == 2
    assert "K below N" in done.stderr

    # One fold alone knows the other half of the dialogues by heart.
    taught = tmp_path / "taught.jsonl"
    ask = ("-m", "train", "teach", "--data", data, "-o", taught)
    done = python(*ask, "--labels", "meld", tmp_path / "0")
    assert done.returncode == 2
    assert "every run was fitted on its dialogue 2" in done.stderr
    assert not taught.exists()
    done = python(*ask, "--labels", "meld", "--in-sample", tmp_path / "0")
    assert done.returncode == 0, done.stderr
    assert all("scores" in turn for turn in read_records(taught)[1]["utterances"])
    done = python(*ask, "--labels", "meld", tmp_path / "0", tmp_path / "1")
    assert done.returncode == 0, done.stderr
    records, originals = read_records(taught), read_records(data)
    assert len(records) == len(originals)
    for record, original in zip(records, originals, strict=True):
        for turn, before in zip(record["utterances"], original["utterances"], strict=True):
            assert {k: v for k, v in turn.items() if k != "scores"} == before
            assert sum(turn["scores"].values()) == pytest.approx(1, abs=1e-4)

    done = python(*ask, "--labels", "meld", "--bf16", tmp_path / "0", tmp_path / "1")
    assert done.returncode == 0, done.stderr
    narrow = read_records(taught)
    pairs = [
        (turn["scores"], other["scores"])
        for record, another in zip(records, narrow, strict=True)
        for turn, other in zip(record["utterances"], another["utterances"], strict=True)
    ]
    assert all(other == pytest.approx(scores, abs=0.05) for scores, other in pairs)
    assert any(other != scores for scores, other in pairs)

    # Under another label set nobody was fitted on them; there the labels are not read.
    done = python(*ask, "--labels", "emorynlp", tmp_path / "0")
    assert done.returncode == 0, done.stderr
    table = f"path = {json.dumps(str(taught))}\nlabels = 'emorynlp'\nsoft = 1.0"
    done = python("-m", "train", "fit", write_recipe("soft", table), "-o", tmp_path / "student")
    assert done.returncode == 0, done.stderr
    missing = table.replace(str(taught), str(data))
    done = python("-m", "train", "fit", write_recipe("bare", missing), "-o", tmp_path / "y")
    assert done.returncode == 4
    assert "run `python -m train teach` first" in done.stderr


def test_soft_targets_mix_scores_and_label(tmp_path: Path) -> None:
    labels = label_set("meld").labels
    scores = {label: 0.4 if label == "sad" else 0.1 for label in labels}
    turn = {"text": "It's gone.", "label": "anger", "scores": scores}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"utterances": [turn, {**turn, "text": " "}]}) + "\n")
    (scene,) = read_dataset(Source(str(path), "meld", soft=0.5)).scenes
    assert scene.target_utterances == [0]
    assert scene.targets[0] is not None
    expected = {**dict.fromkeys(labels, 0.05), "sad": 0.2, "angry": 0.55}
    assert dict(zip(labels, scene.targets[0].tolist(), strict=True)) == pytest.approx(expected)


def test_scores_of_another_set_with_the_same_labels_are_learnt(tmp_path: Path) -> None:
    scores = {label: 0.4 if label == "sadness" else 0.1 for label in label_set("ekman").labels}
    path = tmp_path / "d.jsonl"

    def target() -> list[float]:
        path.write_text(json.dumps({"utterances": [{"text": "It's gone.", "scores": scores}]}))
        (scene,) = read_dataset(Source(str(path), "meld", soft=1.0)).scenes
        assert scene.targets[0] is not None
        result: list[float] = scene.targets[0].tolist()
        return result

    assert target()[label_set("meld").index("sad")] == pytest.approx(0.4)
    scores["joyful"] = scores["joy"]  # one label by two names
    with pytest.raises(InputError, match="no `scores` over the label set meld"):
        target()


@pytest.mark.slow
def test_the_average_of_runs_has_their_mean_weights(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = json.dumps(str(EXAMPLES / "labelled_chat.jsonl"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"base = {json.dumps(str(bert))}\nmethod = 'full'\ntemplate = 'compact'\n"
        f"epochs = 1\nlearning_rate = 1e-2\n[[train]]\npath = {data}\nlabels = 'meld'\n"
    )
    runs = [tmp_path / "1", tmp_path / "2"]
    for run in runs:
        done = python("-m", "train", "fit", recipe, "-o", run, "--seed", run.name)
        assert done.returncode == 0, done.stderr
    mean = tmp_path / "mean"
    done = python("-m", "train", "average", *runs, "-o", mean)
    assert done.returncode == 0, done.stderr
    one, two, both = (load_file(r / "model" / "model.safetensors") for r in (*runs, mean))
    assert any(name.startswith("cls.predictions") for name in both)  # the output embedding's
    for name in both:
        assert torch.allclose(both[name], (one[name] + two[name]) / 2), name
        assert not torch.equal(one[name], two[name]), name
    assert load_run(mean).recipe.seed == 1


def test_adapters_are_not_averaged(trained: Path, tmp_path: Path) -> None:
    done = python("-m", "train", "average", trained, trained, "-o", tmp_path / "mean")
    assert done.returncode == 2
    assert "only full-parameter runs" in done.stderr


def test_token_dropout_thins_what_is_said_and_nothing_else(bert: Path) -> None:
    said = " ".join(["train"] * 200)
    scenes = (Scene(Dialogue((Utterance(said),)), (np.eye(7, dtype=np.float32)[0],)),)
    dataset = Dataset(Source("x", "meld"), label_set("meld"), scenes)
    _, tokenizer = load_causal_lm(str(bert))
    (word,) = tokenizer.encode_content("train", 9)

    def drawn(share: float, epoch: int) -> list[int]:
        recipe = Recipe(base="x", train=(dataset.source,), template="compact", token_dropout=share)
        recipe = dataclasses.replace(recipe, window=Window(max_utterance_tokens=250))
        (step,) = Sampler(recipe, [dataset], tokenizer, {}).epoch(epoch, [Task.EMOTION])
        return [int(token) for token in step.batch.tokens[0] if token]

    whole, thinned = drawn(0.0, 1), drawn(0.25, 1)
    assert whole.count(word) == 200
    assert 110 < thinned.count(word) < 180
    assert [t for t in whole if t != word] == [t for t in thinned if t != word]
    assert thinned == drawn(0.25, 1)  # an epoch is drawn alike each time
    assert thinned != drawn(0.25, 2)


def test_a_gguf_file_becomes_a_base(tmp_path: Path) -> None:
    """Rotary positions need llama.cpp's own order of rows, so logits are compared, not weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_model(tmp_path / "llama", "llama")
    path = write_gguf(tmp_path / "tiny.gguf", source)
    done = python("-m", "train", "base", path, "-o", tmp_path / "base")
    assert done.returncode == 0, done.stderr
    model, base = (
        AutoModelForCausalLM.from_pretrained(f).eval() for f in (source, tmp_path / "base")
    )
    tokens = torch.tensor([[1, 11, 12, 5, 9]])
    assert torch.allclose(base(tokens).logits, model(tokens).logits, atol=1e-5)
    one, other = (AutoTokenizer.from_pretrained(f) for f in (source, tmp_path / "base"))
    said = "oh, the train is late"
    assert other.tokenize(said) == one.tokenize(said)


def test_a_file_that_is_not_gguf_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML" + bytes(64))
    done = python("-m", "train", "base", path, "-o", tmp_path / "base")
    assert done.returncode == 4
    assert f"{path}: cannot be read as GGUF" in done.stderr


def test_only_a_bert_is_turned_into_a_decoder(bert: Path, tmp_path: Path) -> None:
    llama = write_model(tmp_path / "llama", "llama")
    done = python("-m", "train", "base", llama, "-o", tmp_path / "base")
    assert done.returncode == 4
    assert f"{llama}: a llama model" in done.stderr
    part = tmp_path / "part"
    shutil.copytree(bert, part)
    weights = load_file(part / "model.safetensors")
    weights.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    done = python("-m", "train", "base", part, "-o", tmp_path / "base")
    assert done.returncode == 4
    assert "the weights lack bert.encoder.layer.1.output.dense.weight" in done.stderr
    assert not (tmp_path / "base").exists()
