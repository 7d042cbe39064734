"""Labelling runs as processes, and what they have written so far."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from helpers.commands import ROOT


def label(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ercbatch", "label", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def committed(output: Path) -> int:
    """Dialogues in the last commit of a run's journal; 0 before the first one."""
    try:
        rows = output.with_name(output.name + ".journal").read_bytes().splitlines()
        return int(json.loads(rows[-1])["point"]["counts"]["labelled"])
    except (FileNotFoundError, IndexError, KeyError, ValueError):
        return 0


def begun(process: subprocess.Popen[str], output: Path) -> int:
    """Wait until a run has committed something; how much."""
    for _ in range(600):
        result = committed(output)
        if result:
            return result
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("it commits nothing")


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in which `LABEL` is `ercbatch label`."""
    return subprocess.run(
        ["bash", "-c", command.replace("LABEL", f"{sys.executable} -m ercbatch label")],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def stopped(source: Path, bundle: Path, out: Path, *more: str | Path) -> None:
    """Leave a run that was killed after its first commit."""
    process = label(source, "--bundle", bundle, "-o", out, "--commit-every", "0.05", *more)
    begun(process, out)
    process.kill()
    process.communicate()
