"""`python -m train fit`: stages, tasks, interruption, and what goes wrong on the way."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CHAT, write_model, write_recipe
from helpers.commands import ROOT, python
from helpers.scenes import dataset, recipe, scene
from safetensors.torch import load_file

from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.errors import UsageError
from ercbatch.prompts.tree import Task
from ercbatch.retrieval.bank import Demonstration, DemonstrationBank
from ercbatch.scoring.checkpoints import load_causal_lm
from ercbatch.scoring.packed_model import PackedModel
from train.datasets import Scene, one_hot, read_dataset, share
from train.loop import Fitting, Hooks, Objective
from train.model import load_trainable
from train.run import load_run
from train.samples import Sampler, TrainingBank
from train.sources import Source
from train.validate import Validation

pytestmark = pytest.mark.transformers

CHAT_DATA = Source(str(CHAT), "meld")


def figures(run: Path) -> list[dict[str, Any]]:
    """A run's epochs without their durations."""
    epochs = json.loads((run / "run.json").read_text())["epochs"]
    return [{key: value for key, value in e.items() if key != "seconds"} for e in epochs]


def test_speakers_are_learnt_first_and_the_rest_after(trained: Path) -> None:
    run = json.loads((trained / "run.json").read_text())
    first, *rest = run["epochs"]
    assert first["stage"] == "speaker"
    assert list(first["losses"]) == ["speaker"]
    assert {e["stage"] for e in rest} == {"emotion + impact"}
    assert list(first["valid"]["meld"]) == ["speaker_accuracy"]
    assert all(e["valid"]["meld"]["weighted_f1"] >= 0 for e in rest)
    with (trained / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert rows[0]["weighted_f1"] == rows[1]["speaker_accuracy"] == ""
    assert 0 < float(rows[0]["speaker_accuracy"]) < 1
    assert float(rows[-1]["weighted_f1"]) == pytest.approx(
        rest[-1]["valid"]["meld"]["weighted_f1"], abs=1e-5
    )
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("values", "stages"),
    [
        ({}, [("speaker", 3), ("emotion + impact", 6)]),
        ({"tasks": ("emotion",)}, [("emotion", 6)]),
        ({"tasks": ("speaker",)}, [("speaker", 3)]),
        ({"tasks": ("speaker", "emotion")}, [("speaker", 3), ("emotion", 6)]),
        ({"speaker_epochs": 0}, [("emotion + impact + speaker", 6)]),
    ],
)
def test_tasks_make_stages(values: dict[str, Any], stages: list[tuple[str, int]]) -> None:
    assert [(str(s), s.epochs) for s in recipe(**values).stages] == stages


def test_the_loss_is_the_emotion_loss_and_alpha_times_the_impact_loss(trained: Path) -> None:
    for epoch in json.loads((trained / "run.json").read_text())["epochs"][1:]:
        losses = epoch["losses"]
        assert epoch["loss"] == pytest.approx(losses["emotion"] + 0.1 * losses["impact"], rel=1e-4)


def test_no_later_turn_and_no_label_reaches_an_answer(bert: Path) -> None:
    """The first sign of a model that cheats: change what it must not see, its answers move."""
    model, tokenizer = load_causal_lm(str(bert))
    packed = PackedModel(model.eval())
    said = ("where is my train", "it is gone", "oh no", "yes it is late")

    def states(changed: Scene) -> torch.Tensor:
        sampler = Sampler(recipe(), [dataset(changed)], tokenizer, {})
        (step,) = sampler.epoch(1, [Task.EMOTION, Task.IMPACT])
        with torch.no_grad():
            result: torch.Tensor = packed(*step.batch)
        return result

    original = states(scene(*said))
    # In order of the prompts' ends: emotion 0, impact 1, emotion 1, impact 2, emotion 2, ...
    assert len(original) == 7
    later = states(scene(*said[:2], "thank you please", said[3]))
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(original, later, strict=True)]
    assert same == [True, True, True, True, False, False, False]
    sad = dataclasses.replace(scene(*said), targets=(one_hot(3, 7),) * 4)
    assert torch.equal(states(sad), original)


def test_no_demonstration_comes_from_the_dialogue_itself(bert: Path) -> None:
    """It would show a gold label of the dialogue, of a later turn perhaps."""
    _, tokenizer = load_causal_lm(str(bert))
    own, others = ("where is my train", "it is gone", "oh no"), ("my parcel is lost", "thank you")
    texts = (*own, *others)
    vectors = np.eye(len(texts), dtype=np.float32)
    by_text = dict(zip(texts, vectors, strict=True))

    def said(shown: float, count: int) -> torch.Tensor:
        bank = DemonstrationBank(
            [Demonstration(t, "neutral") for t in texts[:count]], vectors[:count]
        )
        wanted = recipe(demonstrations=shown, encoder="e", demonstrations_most=1)
        sampler = Sampler(
            wanted, [dataset(scene(*own))], tokenizer, {0: TrainingBank(bank, by_text)}
        )
        (step,) = sampler.epoch(1, [Task.EMOTION])
        return step.batch.tokens

    assert torch.equal(said(1.0, len(own)), said(0.0, len(own)))
    assert said(1.0, len(texts)).shape[1] > said(0.0, len(texts)).shape[1]


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_metrics(bert: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, bert, epochs=10, packs_per_step=1, average=0.5)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = python("-m", "train", "fit", path, "-o", whole)
    assert done.returncode == 0, done.stderr

    fit = [sys.executable, "-m", "train", "fit", str(path), "-o", str(broken), "--save-every", "0"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 75)):
        resume = ["--resume"] if (broken / "state.pt").exists() else []
        before = (broken / "state.pt").stat().st_mtime_ns if resume else 0
        process = subprocess.Popen(
            [*fit, *resume], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None:
            time.sleep(0.02)
            state = broken / "state.pt"
            if state.exists() and state.stat().st_mtime_ns > before:
                process.send_signal(number)
                break
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == code, stderr
    command = stderr.split("to go on: ")[1].strip()
    assert command == " ".join(["python", *fit[1:], "--resume"])

    done = python(*fit[1:])
    assert done.returncode == 2
    assert "go on with --resume, or start again with --force" in done.stderr
    other = python(*fit[1:], "--resume", "--seed", "7")
    assert other.returncode == 2
    assert "recipe.seed is not what the run began with" in other.stderr
    done = python(*fit[1:], "--resume")
    assert done.returncode == 0, done.stderr
    assert figures(broken) == figures(whole)
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (broken / adapter).read_bytes() == (whole / adapter).read_bytes()
    assert not (broken / "state.pt").exists()
    again = python(*fit[1:], "--resume")
    assert again.returncode == 0
    assert "nothing to resume" in again.stderr


def test_training_resumed_anywhere_ends_the_same(bert: Path) -> None:
    """Also the one between two stages, whose optimizer the next stage must not take over."""
    wanted = dataclasses.replace(recipe(), base=str(bert), epochs=2, speaker_epochs=2, average=0.5)
    wanted = dataclasses.replace(wanted, learning_rate=1e-2, packs_per_step=1, pack_tokens=64)
    data = dataset(scene("oh no", "my train"), scene("yes", "it is gone", "thank you"))

    def end(state: Any, states: list[bytes]) -> list[torch.Tensor]:
        packed, _, tokenizer = load_trainable(wanted, torch.device("cpu"), bfloat16=False)

        def save(state: Any) -> None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            states.append(buffer.getvalue())

        hooks = Hooks(
            evaluate=lambda tasks: ({}, {}),
            keep=lambda figures: None,
            epoch_finished=lambda epochs: None,
            save=save,
            report=lambda text: None,
            stopping=lambda: False,
        )
        sampler = Sampler(wanted, [data], tokenizer, {})
        Fitting(packed, sampler, wanted, hooks, Accelerator(cpu=True), save_every=0).run(state)
        return [p.detach() for p in packed.parameters() if p.requires_grad]

    states: list[bytes] = []
    whole = end(None, states)
    finished = set()
    for saved in states:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        finished.add(len(state["progress"]["finished"]))
        again = end(state, [])
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert finished == {0, 1, 2, 3, 4}


def test_a_loss_that_is_no_number_stops_with_good_weights(bert: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = write_recipe(tmp_path, bert, learning_rate=1e30, clip=1e30, warmup=0.0, epochs=9)
    done = python("-m", "train", "fit", path, "-o", run)
    assert done.returncode == 1
    assert "lower learning_rate" in done.stderr
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    with pytest.raises(UsageError, match="diverged in its first epoch"):
        load_run(run)
    again = python("-m", "train", "fit", path, "-o", run, "--resume")
    assert again.returncode == 2
    assert "diverged: lower learning_rate" in again.stderr


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_epoch_that_is_kept_is_the_one_that_is_tested(
    method: str, bert: Path, tmp_path: Path
) -> None:
    # The mean is measured and written, so the weights in memory are never those that were kept.
    path = write_recipe(tmp_path, bert, method=method, tasks=["emotion"], epochs=3, average=0.9)
    table = path.read_text().split("[[valid]]")[1]
    path.write_text(f"{path.read_text()}[[test]]{table}")
    done = python("-m", "train", "fit", path, "-o", tmp_path / "run", "--set", "learning_rate=0.1")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    kept = run["epochs"][run["kept"] - 1]["valid"]["meld"]
    assert run["test"]["meld"] == pytest.approx(kept, abs=1e-5)
    assert not (tmp_path / "run" / "state.pt").exists()
    assert any(name.startswith(str(bert)) for name in run["files"])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    base = write_model(tmp_path, kind)
    gradients = []
    for checkpointing in (False, True):
        wanted = dataclasses.replace(
            recipe(), base=str(base), gradient_checkpointing=checkpointing, lora_dropout=0.0
        )
        wanted = dataclasses.replace(wanted, dropout=0.0) if kind == "bert" else wanted
        packed, _, tokenizer = load_trainable(wanted, torch.device("cpu"), bfloat16=False)
        sampler = Sampler(wanted, [dataset(scene("oh no", "my train"))], tokenizer, {})
        (step,) = sampler.epoch(1, [Task.EMOTION])
        objective = Objective(packed.train(), sampler.answer_tokens, 0.0)
        objective(step).sum().backward()
        gradients.append([p.grad for p in packed.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("load", "error"), [("full", 1e-5), ("nf4", 0.05), ("int8", 0.05)])
def test_a_saved_adapter_gives_what_it_gave_in_training(
    load: str, error: float, tmp_path: Path
) -> None:
    base, run = write_model(tmp_path / "base", "llama"), tmp_path / "run"
    # As most models are published.
    load_causal_lm(str(base), dtype=torch.bfloat16)[0].save_pretrained(base)
    path = write_recipe(tmp_path, base, tasks=["emotion"], epochs=4)
    done = python("-m", "train", "fit", path, "-o", run, "--load", load)
    assert done.returncode == 0, done.stderr
    losses = [epoch["loss"] for epoch in figures(run)]
    assert losses[-1] < losses[0]
    # Merged, up to the arithmetic of few bits.
    merged = load_run(run)
    result = Validation(merged.model, merged.tokenizer, merged.recipe, [read_dataset(CHAT_DATA)])
    kept = json.loads((run / "run.json").read_text())["kept"]
    valid = figures(run)[kept - 1]["valid"]["meld"]
    assert result.metrics([Task.EMOTION])["meld"]["log_loss"] == pytest.approx(
        valid["log_loss"], abs=error
    )


def test_only_adapters_train_on_a_quantized_base(bert: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, bert)
    done = python("-m", "train", "fit", path, "-o", tmp_path / "run", "--load", "nf4", "--full")
    assert done.returncode == 2
    assert "is for LoRA" in done.stderr


@pytest.mark.parametrize("kind", ["bert", "llama"])  # with biases and without
def test_gradients_pass_a_quantized_base_that_was_evaluated(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = write_model(tmp_path, kind)
    wanted = dataclasses.replace(recipe(load="nf4", lora_dropout=0.0), base=str(base))
    packed, _, tokenizer = load_trainable(wanted, torch.device("cpu"), bfloat16=False)
    sampler = Sampler(wanted, [dataset(scene("oh no", "my train"))], tokenizer, {})
    step = sampler.epoch(1, [Task.EMOTION])[0]
    objective = Objective(packed, sampler.answer_tokens, 0.0)
    first = next(p for p in packed.parameters() if p.requires_grad and p.ndim > 1)
    torch.nn.init.ones_(next(p for n, p in packed.named_parameters() if "lora_B" in n))

    def gradient() -> torch.Tensor:
        packed.zero_grad()
        objective.train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            objective(step).sum().backward()
        assert first.grad is not None
        return first.grad.clone()

    before = gradient()
    objective.eval()
    with torch.no_grad():
        objective(step)
    assert before.abs().max() > 0
    assert torch.allclose(gradient(), before, rtol=1e-3, atol=1e-6)


def test_a_fraction_is_taken_of_each_dataset_or_of_all_merged() -> None:
    big, small = dataset(*[scene("a")] * 90), dataset(*[scene("b")] * 10)

    def sizes(**values: Any) -> list[int]:
        return [len(d.scenes) for d in share([big, small], recipe(**values))]

    assert sizes() == [90, 10]
    assert sizes(fraction=0.5) == [45, 5]
    assert sizes(fraction=1 / 64) == [1, 1]
    merged = [sizes(fraction=0.5, mix="total", seed=seed) for seed in range(9)]
    assert {sum(size) for size in merged} == {50}
    assert len({tuple(size) for size in merged}) > 1
    said = [Utterance(str(n)) for n in range(40)]
    scenes = [Scene(Dialogue((u,)), (np.eye(7, dtype=np.float32)[0],)) for u in said]
    (one,), (same,), (other,) = (
        share([dataset(*scenes)], recipe(fraction=0.25, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_too_little_memory_is_reported_before_loading(bert: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in bert.iterdir():
        if path.suffix != ".safetensors":
            (base / path.name).write_bytes(path.read_bytes())
    size = 10**12  # bytes, none of them on the disk
    header = {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    done = python("-m", "train", "fit", write_recipe(tmp_path, base), "-o", tmp_path / "run")
    assert done.returncode == 2
    assert "too little memory" in done.stderr
    assert "3725.3 GiB" in done.stderr


def test_a_window_longer_than_the_base_reads_is_refused(bert: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, bert)
    path.write_text(path.read_text().replace("max_tokens = 400", "max_tokens = 2000"))
    done = python("-m", "train", "fit", path, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert "window.max_tokens is 2000, but" in done.stderr
    assert "reads at most 1024 tokens" in done.stderr
