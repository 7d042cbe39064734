"""Commands of the project, each in a process of its own.

Importing torch, transformers and peft takes longer than most commands that need them. These
commands are forked from a server process that has imported the libraries.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_SECONDS = 300
_FORKED = ("train", "export", "benchmarks")
"""Packages whose commands are forked."""
_IMPORTED = ["export.bundle", "export.recalibrate", "train.average", "train.fit", "train.teach"]


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python on arguments, in the checkout.

    `-m` with a module of this project that needs torch is forked, unless an environment is given.
    """
    words = [str(argument) for argument in arguments]
    if words[0] == "-m" and words[1].partition(".")[0] in _FORKED and not environment:
        return _fork(words[1:])
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
    )


def last_line(*arguments: str | Path) -> dict[str, Any]:
    """Run a module of this project; the JSON object in the last line of its output."""
    done = python("-m", *arguments)
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def _fork(command: list[str]) -> subprocess.CompletedProcess[str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with NamedTemporaryFile("r") as stdout, NamedTemporaryFile("r") as stderr:
        process = context.Process(target=_run, args=(command, stdout.name, stderr.name))
        process.start()
        process.join(_TIMEOUT_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, _TIMEOUT_SECONDS)
        return subprocess.CompletedProcess(command, process.exitcode, stdout.read(), stderr.read())


def _run(command: Sequence[str], *outputs: str) -> None:
    """Be `python -m command`, in a forked process."""
    for descriptor, name in enumerate(outputs, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
