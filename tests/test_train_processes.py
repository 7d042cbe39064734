"""`python -m train fit` in two processes of torch.distributed, which share the steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from helpers.commands import ROOT, python

pytestmark = [pytest.mark.transformers, pytest.mark.slow]

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def recipe(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("shared"), bert, packs_per_step=1, epochs=6)


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    """What two processes trained."""
    folder = recipe.parent / "run"
    done = python(*LAUNCH, "train", "fit", recipe, "-o", folder, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch 7/7: ") == 1
    return folder


def epochs(run: Path) -> list[dict[str, Any]]:
    value: list[dict[str, Any]] = json.loads((run / "run.json").read_text())["epochs"]
    return value


def test_each_process_trains_on_half_of_the_tokens(recipe: Path, run: Path, tmp_path: Path) -> None:
    alone = python("-m", "train", "fit", recipe, "-o", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    ours, theirs = epochs(run), epochs(tmp_path / "alone")
    assert [e["stage"] for e in ours] == [e["stage"] for e in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert 0.4 < mine["tokens"] / other["tokens"] < 0.7


def test_stopped_processes_resume_to_the_same_weights(
    recipe: Path, run: Path, tmp_path: Path
) -> None:
    """Each process resumes with its own dropout."""
    fit = (*LAUNCH, "train", "fit", str(recipe), "-o", str(tmp_path / "broken"))
    process = subprocess.Popen(
        [sys.executable, *fit, "--save-every", "0"],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (tmp_path / "broken" / "state.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert "torchrun --nproc_per_node 2 -m train fit" in stderr
    done = python(*fit, "--resume", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "broken" / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
