"""How soon a label comes: from nothing, and from a labeller that is open.

    python -m benchmarks.latency [BUNDLE] [INPUT]

Cold: whole fresh processes of `ercbatch label` on one dialogue, the first of INPUT, from their
start to the first labelled line and to their end. Others go the same way step by step and tell what
each step takes. The files have been read before: the disk's own time is not in it. Warm: dialogues
of invented sentences, one after another, in one process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from benchmarks.lib.sentences import converse, invent
from ercbatch.errors import UsageError
from ercbatch.inputs.records import dump_line, read_dialogues
from ercbatch.labeler import Labeler
from ercbatch.scoring.threads import available_threads
from ercbatch.terminal.stopping import exit_on_errors

_ROOT = Path(__file__).resolve().parent.parent
_CHAT = _ROOT / "examples" / "group_chat.jsonl"
_TURNS = (1, 5, 20)
_STEPS = """
import sys, time
from pathlib import Path
times = [time.monotonic()]
from ercbatch.labeler import Labeler
from ercbatch.inputs.records import read_dialogues
from ercbatch.runs.run import run_label
times.append(time.monotonic())
from ercbatch.bundle.bundle import find_bundle, open_bundle
bundle = open_bundle(find_bundle(sys.argv[1]))
times.append(time.monotonic())
labeler = Labeler(bundle, threads=int(sys.argv[3]))
times.append(time.monotonic())
next(labeler.label(dialogue for _, dialogue in read_dialogues(Path(sys.argv[2]))))
times.append(time.monotonic())
print(*times)
"""
"""What `ercbatch label` does before its first line, with the times between. It runs in a process of
its own, which has nothing of what this module imports."""
_STEP_NAMES = ("start Python", "import", "verify digests", "open the model", "first label")


def cold(bundle: str, dialogue: Path, threads: int) -> tuple[float, float]:
    """Seconds from the start of a command to its first line, and to its end.

    Raises:
        UsageError: the command fails.
    """
    command = (
        *(sys.executable, "-m", "ercbatch", "label", str(dialogue), "--quiet"),
        *("--bundle", bundle, "--threads", str(threads)),
    )
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment()) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        first = time.monotonic() - began
        process.stdout.read()
        code = process.wait()
    if code or not line:
        raise UsageError(f"`ercbatch label` ended with {code}: see above")
    return first, time.monotonic() - began


def steps(bundle: str, dialogue: Path, threads: int) -> dict[str, float]:
    """Seconds of each step up to the first label.

    Raises:
        UsageError: the process fails.
    """
    began = time.monotonic()
    command = (sys.executable, "-c", _STEPS, bundle, str(dialogue), str(threads))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=_environment())
    if done.returncode:
        raise UsageError("the steps of labelling failed: see above")
    times = [began, *(float(t) for t in done.stdout.split())]
    return {
        name: after - before
        for name, before, after in zip(_STEP_NAMES, times, times[1:], strict=False)
    }


def _environment() -> dict[str, str]:
    # The package of this checkout, wherever the command runs.
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def warm(labeler: Labeler, turns: int, runs: int) -> dict[str, float]:
    """Milliseconds for a dialogue of so many turns: the median, and what 95 of 100 stay within."""
    texts = [sentence.text for sentence in invent(turns * (runs + 1), seed=turns)]
    milliseconds = []
    for dialogue in converse(texts, turns):
        began = time.perf_counter()
        for _ in labeler.label([dialogue]):
            pass
        milliseconds.append(1e3 * (time.perf_counter() - began))
    p50, p95 = np.percentile(milliseconds[1:], (50, 95))  # the first one warms up
    return {"p50_ms": round(float(p50), 2), "p95_ms": round(float(p95), 2)}


def _summarize(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def measure(bundle: str, source: Path, threads: int, cold_runs: int, runs: int) -> dict[str, Any]:
    """All metrics; cold ones in seconds.

    Raises:
        ErcbatchError: the bundle or the input is not usable.
    """
    (dialogue,) = islice((d for _, d in read_dialogues(source)), 1)
    firsts, ends, step_seconds = [], [], []
    with TemporaryDirectory() as folder:
        path = Path(folder, "dialogue.jsonl")
        path.write_bytes(dump_line(dict(dialogue.record)))
        cold(bundle, path, threads)  # brings the files into memory
        for _ in range(cold_runs):
            first, end = cold(bundle, path, threads)
            firsts.append(first)
            ends.append(end)
            step_seconds.append(steps(bundle, path, threads))
    labeler = Labeler(bundle, threads=threads)
    return {
        "bundle": bundle,
        "threads": threads,
        "turns": len(dialogue.utterances),
        "cold_runs": cold_runs,
        "warm_runs": runs,
        "first_label_seconds": _summarize(firsts),
        "whole_command_seconds": _summarize(ends),
        "step_seconds": {name: _summarize([p[name] for p in step_seconds]) for name in _STEP_NAMES},
        "warm": {str(turns): warm(labeler, turns, runs) for turns in _TURNS},
    }


def show(result: Mapping[str, Any]) -> list[str]:
    """The lines of a table."""
    rows = {
        "first label": result["first_label_seconds"],
        "whole command": result["whole_command_seconds"],
        **{f"  {name}": spread for name, spread in result["step_seconds"].items()},
    }
    lines = [f"{'cold, s':24}" + "".join(f"{name:>10}" for name in ("median", "min", "max"))]
    lines += [
        f"{name:24}" + "".join(f"{v:>10.3f}" for v in row.values()) for name, row in rows.items()
    ]
    lines.append(f"{'warm, ms':24}" + "".join(f"{name:>10}" for name in ("p50", "p95")))
    for turns, row in result["warm"].items():
        lines.append(f"{turns + ' turns':24}" + "".join(f"{v:>10.2f}" for v in row.values()))
    return lines


@click.command()
@click.argument("bundle", default="mini")
@click.argument(
    "source", default=_CHAT, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--threads", type=click.IntRange(1), help="Default: all that the process may use.")
@click.option("--cold", "cold_runs", type=click.IntRange(1), default=15, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=200, show_default=True, help="Warm ones.")
def main(bundle: str, source: Path, threads: int | None, cold_runs: int, runs: int) -> None:
    """Measure BUNDLE on the first dialogue of SOURCE (JSONL)."""
    with exit_on_errors():
        result = measure(bundle, source, threads or available_threads(), cold_runs, runs)
    for line in show(result):
        click.echo(line)
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.latency")
