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
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.lib.workers import Peak, Worker
from ercbatch.bundle.manifest import RUNTIME_OF_FORM
from ercbatch.dialogues import Dialogue
from ercbatch.errors import UsageError
from ercbatch.inputs.records import read_dialogues

_ROOT = Path(__file__).resolve().parent.parent
_CHAT = _ROOT / "examples" / "labelled_chat.jsonl"
_TEXTS = (
    _ROOT / "ercbatch" / "prompts" / "templates.py",
    _ROOT / "ercbatch" / "data" / "label_sets.json",
)
"""What the tokenizer is trained on, beside the dialogues: where a prompt's words stand."""
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


def _read(trial: Trial) -> list[Dialogue]:
    return [dialogue for _, dialogue in read_dialogues(trial.dialogues)]


def label(trial: Trial, forms: Sequence[str], failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Label with each form in turns; metrics of each. What cannot label goes into `failed`."""
    processes: dict[str, Worker] = {}
    for form in forms:
        try:
            processes[form] = Worker(str(trial.bundle(form)), trial.threads, partial(_read, trial))
        except UsageError as error:
            failed[form] = str(error)
    for _ in range(trial.rounds):
        for form in list(processes):
            try:
                processes[form].round()
            except UsageError as error:
                failed[form] = str(error)
                del processes[form]
    count = sum(len(d.nonblank) for d in _read(trial))
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
        if form not in RUNTIME_OF_FORM:
            raise click.BadParameter(f"{form!r} is not one of {', '.join(RUNTIME_OF_FORM)}")
    return forms


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", default="qwen2.5-0.5b", show_default=True, help="See shapes.py.")
@click.option(
    "--forms",
    default=",".join(form for form in RUNTIME_OF_FORM if form != "optimum"),
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
