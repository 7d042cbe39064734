"""What each form of a bundle costs: memory and time to export it, its size, and how fast it labels.

    python -m benchmarks.forms WORK

A model of a known shape with random weights is written to WORK once, in bfloat16. Each form is
exported from it by the real command, in a process of its own; then a process for each form labels
the same dialogues, the forms in turns, so that a drift of the machine meets all of them.

Memory is told twice, in MB of 10^6 bytes: the peak of what is resident, and the peak of what is
anonymous in it. The pages of a mapped file are resident too, but go where others need the room: a
machine must have the anonymous memory. The labels of random weights mean nothing.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

from ercbatch.bundle.manifest import RUNTIMES
from ercbatch.dialogues import Dialogue
from ercbatch.errors import ErcbatchError
from ercbatch.inputs.records import read_dialogues
from ercbatch.labeler import Labeler

_ROOT = Path(__file__).resolve().parent.parent
_CHAT = _ROOT / "examples" / "labelled_chat.jsonl"
_TEXTS = (
    _ROOT / "ercbatch" / "prompts" / "templates.py",
    _ROOT / "ercbatch" / "data" / "label_sets.json",
)
"""What the tokenizer is trained on, beside the dialogues: where a prompt's words stand."""
_POLL_SECONDS = 0.02
"""Seconds between two looks at a process."""
_COLUMNS = {
    "export_seconds": "export, s",
    "export_resident_mb": "resident, MB",
    "export_anonymous_mb": "anonymous, MB",
    "export_ratio": "of float16",
    "bundle_mb": "bundle, MB",
    "per_second": "utterances/s",
    "ratio": "of fp32",
    "label_resident_mb": "labelling: res.",
    "label_anonymous_mb": "anonymous, MB",
}
"""Metric -> its heading."""


class Peak:
    """Looks at the memory of a process until it is closed, or the process ends (Linux)."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self.resident = 0.0
        self.anonymous = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no longer."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            try:
                lines = self._status.read_text(encoding="utf-8").splitlines()
            except OSError:
                return
            fields = dict(line.split(":", 1) for line in lines)
            if "RssAnon" not in fields:  # it has ended, and nobody has waited for it yet
                return
            # The kernel keeps the peak of the one; that of the other is seen, or missed.
            self.resident = _mb(fields["VmHWM"])
            self.anonymous = max(self.anonymous, _mb(fields["RssAnon"]))


def _mb(kilobytes: str) -> float:
    return int(kilobytes.split()[0]) * 1024 / 1e6


@dataclass(frozen=True, slots=True)
class Trial:
    """What is exported and labelled, and how."""

    work: Path
    dialogues: Path
    template: str
    threads: int
    rounds: int

    def bundle(self, form: str) -> Path:
        """The bundle of a form."""
        return self.work / form


def export(
    trial: Trial, checkpoint: Path, form: str, options: Sequence[str] = ()
) -> dict[str, float]:
    """Export a form, with more `options` of the command; time, peak memory and size.

    Raises:
        RuntimeError: it fails.
    """
    folder = trial.bundle(form)
    command = (
        *(sys.executable, "-m", "export", "bundle", str(checkpoint), "-o", str(folder)),
        *("--zero-shot", str(trial.dialogues), "--labels", "meld", "--template", trial.template),
        *("--name", form, "--quantize", form, "--accept-loss", "--licence", "none", "--force"),
        *options,
    )
    log_path = trial.work / f"{form}.log"
    began = time.perf_counter()
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT)
        with closing(Peak(process.pid)) as peak:
            code = process.wait()
    seconds = time.perf_counter() - began
    if code:
        log_lines = log_path.read_text(encoding="utf-8").strip().splitlines() or ["nothing said"]
        raise RuntimeError(f"export ended with {code}: {log_lines[-1]} ({log_path})")
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "export_seconds": round(seconds, 1),
        "export_resident_mb": round(peak.resident, 1),
        "export_anonymous_mb": round(peak.anonymous, 1),
        "bundle_mb": round(size / 1e6, 1),
    }


def _label(trial: Trial, form: str, pipe: Connection) -> None:
    """In a process of its own: open a bundle, and label all dialogues whenever one is asked to."""
    try:
        labeler = Labeler(str(trial.bundle(form)), threads=trial.threads)
        dialogues = _read(trial)
        next(labeler.label(dialogues[:1]))
    except ErcbatchError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        began = time.perf_counter()
        for _ in labeler.label(dialogues):
            pass
        pipe.send(time.perf_counter() - began)


def _read(trial: Trial) -> list[Dialogue]:
    return [dialogue for _, dialogue in read_dialogues(trial.dialogues)]


class Labelling:
    """A process that has opened the bundle of a form, and labels with it.

    Raises:
        RuntimeError: the bundle cannot be opened, or its process has ended.
    """

    def __init__(self, trial: Trial, form: str) -> None:
        context = get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_label, args=(trial, form, child_pipe), daemon=True)
        self._process.start()
        child_pipe.close()  # so that the end of the process is the end of the pipe
        assert self._process.pid is not None  # it has started
        self.peak = Peak(self._process.pid)
        self.seconds: list[float] = []
        failure = self._answer()
        if failure:
            self.close()
            raise RuntimeError(failure)

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self.close()
            raise RuntimeError(f"labelling ended with {self._process.exitcode}") from None

    def round(self) -> None:
        """Label all dialogues once.

        Raises:
            RuntimeError: the process has ended.
        """
        self._pipe.send(None)
        self.seconds.append(self._answer())

    def close(self) -> None:
        """End the process."""
        self.peak.close()
        self._pipe.close()
        self._process.join()


def label(trial: Trial, forms: Sequence[str], failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Label with each form in turns; metrics of each. What cannot label goes into `failed`."""
    processes: dict[str, Labelling] = {}
    for form in forms:
        try:
            processes[form] = Labelling(trial, form)
        except RuntimeError as error:
            failed[form] = str(error)
    for _ in range(trial.rounds):
        for form in list(processes):
            try:
                processes[form].round()
            except RuntimeError as error:
                failed[form] = str(error)
                del processes[form]
    count = sum(len(d.said) for d in _read(trial))
    metrics: dict[str, dict[str, Any]] = {}
    for form, labelling in processes.items():
        labelling.close()
        metrics[form] = {
            "per_second": round(count / statistics.median(labelling.seconds), 2),
            "label_resident_mb": round(labelling.peak.resident, 1),
            "label_anonymous_mb": round(labelling.peak.anonymous, 1),
        }
        if "fp32" in processes:
            pairs = zip(processes["fp32"].seconds, labelling.seconds, strict=True)
            metrics[form]["ratio"] = round(
                statistics.median(f / form_seconds for f, form_seconds in pairs), 2
            )
    return metrics


def measure(trial: Trial, model: str, forms: Sequence[str]) -> dict[str, Any]:
    """All metrics; `failed` maps a form to why it has none."""
    from benchmarks.lib.shapes import write_checkpoint  # torch, which no labelling process needs

    checkpoint = trial.work / "checkpoint"
    parameters = write_checkpoint(checkpoint, model, (*_TEXTS, trial.dialogues))
    float16_mb = 2 * parameters / 1e6
    failed: dict[str, str] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for form in forms:
        try:
            metrics[form] = export(trial, checkpoint, form)
        except RuntimeError as error:
            failed[form] = str(error)
            continue
        metrics[form]["export_ratio"] = round(metrics[form]["export_anonymous_mb"] / float16_mb, 2)
        click.echo(f"{form}: {json.dumps(metrics[form])}", err=True)
    if trial.rounds:
        for form, labelling_metrics in label(trial, list(metrics), failed).items():
            metrics[form] |= labelling_metrics
    return {
        "model": model,
        "parameters": parameters,
        "float16_mb": round(float16_mb, 1),
        "template": trial.template,
        "threads": trial.threads,
        "rounds": trial.rounds,
        "forms": metrics,
        "failed": failed,
    }


def _forms(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    forms = value.split(",")
    for form in forms:
        if form not in RUNTIMES:
            raise click.BadParameter(f"{form!r} is not one of {', '.join(RUNTIMES)}")
    return forms


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", default="qwen2.5-0.5b", show_default=True, help="See shapes.py.")
@click.option(
    "--forms",
    default=",".join(form for form in RUNTIMES if form != "optimum"),
    show_default=True,
    callback=_forms,
    help="Which, of those of `export bundle --quantize`.",
)
@click.option(
    "--dialogues",
    default=_CHAT,
    show_default="the labelled example",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With the labels of meld.",
)
@click.option("--template", default="paper", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="To label.")
@click.option(
    "--rounds", type=click.IntRange(0), default=3, show_default=True, help="0 labels nothing."
)
def main(
    work: Path,
    model: str,
    forms: list[str],
    dialogues: Path,
    template: str,
    threads: int,
    rounds: int,
) -> None:
    """Measure in WORK, which is left with the checkpoint and a bundle for each form."""
    trial = Trial(work.resolve(), dialogues.resolve(), template, threads, rounds)
    result = measure(trial, model, forms)
    click.echo(f"{'':10}" + "".join(f"{heading:>16}" for heading in _COLUMNS.values()))
    for form, metrics in result["forms"].items():
        row = "".join(f"{metrics.get(name, ''):>16}" for name in _COLUMNS)
        click.echo(f"{form:10}{row}")
    for form, reason in result["failed"].items():
        click.echo(f"{form}: {reason}", err=True)
    click.echo(json.dumps(result))
    if result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.forms")
