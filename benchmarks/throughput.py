"""How fast ercbatch labels, against other inference engines on the same model and prompts.

    bash benchmarks/peers/setup.sh WORK/peers
    python -m benchmarks.throughput WORK INPUT

A model of a known shape with random weights is written to WORK once; ours is exported from it by
the real command, and every other engine converts it itself. Each is a process of its own, all on
the same processors, and they take turns, round after round. A round has dialogues of its own,
because a cache of prefixes must not find what it computed in the round before. For each utterance
the others get the ordinary prompt, as token ids, for the very turns (and demonstrations) that our
packed question sees, and give the likeliest next token; ours gets the dialogues, and renders and
tokenizes them within its time. The prompts that warm an engine up begin as no measured one does.

The labels of random weights mean nothing, but must be the same: the likeliest token of every engine
is held against that of transformers, and our labels and probabilities against those that
transformers' logits give. "Of limit" is the share of our time that the matrix products alone would
take: see `benchmarks.limit`.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import forms
from benchmarks.lib.engines import BASELINE, KINDS, EngineProcess
from benchmarks.lib.plan import Plan, Round, make_plan
from benchmarks.limit import Rate
from benchmarks.peers.engine import Order
from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import find_bundle
from ercbatch.errors import UsageError
from ercbatch.inputs.records import read_dialogues
from ercbatch.retrieval.bank import TEXTS
from ercbatch.terminal.stopping import exit_on_errors

_CHAT = Path(__file__).resolve().parent.parent / "examples" / "labelled_chat.jsonl"
"""What exports are measured on, as they must be."""
_COLUMNS = {
    "per_second": "utterances/s",
    "of_baseline": f"of {BASELINE}",
    "of_best_peer": "of best peer",
    "of_best_alike": "of best alike",
    "of_limit": "of limit",
    "agreement": "agreement",
    "largest_difference": "differs by",
}
"""Metric -> its heading."""
Answers = Mapping[str, Sequence[Mapping[str, Any]]]
"""Engine -> its answer in each round."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is compared, where, and how."""

    work: Path
    model: str
    peers: Path
    engines: Sequence[str]
    threads: int
    rounds: int
    demonstrations: int
    template: str
    reuse: bool

    def processors(self) -> list[int]:
        """Those that every engine runs on: the last ones.

        Raises:
            UsageError: there are fewer.
        """
        available = sorted(os.sched_getaffinity(0))
        if len(available) < self.threads:
            raise UsageError(f"{self.threads} threads on {len(available)} processors: name fewer")
        return available[-self.threads :]


def export(trial: Trial, checkpoint: Path, failed: dict[str, str]) -> dict[str, Path]:
    """A bundle of each form that is needed; an engine that lacks its own goes into `failed`."""
    folder = trial.work / f"bundles-{trial.template}-{trial.demonstrations}"
    folder.mkdir(exist_ok=True)
    forms_trial = forms.Trial(folder, _CHAT, trial.template, trial.threads, trial.rounds)
    options: list[str] = []
    if trial.demonstrations:
        bank = find_bundle("mini") / TEXTS
        options = ["--encoder", "mini", "--examples", str(bank)]
        options += ["--demos", str(trial.demonstrations)]
    ours = [name for name in trial.engines if KINDS[name].ours]
    bundles: dict[str, Path] = {}
    for form in dict.fromkeys([KINDS[name].weights for name in ours] or ["fp32"]):
        bundle = forms_trial.bundle(form)
        try:
            if not (trial.reuse and bundle.exists()):
                _say(f"exporting {form}")
                forms.export(forms_trial, checkpoint, form, options)
            bundles[form] = bundle
        except RuntimeError as error:
            failed |= {name: str(error) for name in ours if KINDS[name].weights == form}
    return bundles


def open_engines(
    trial: Trial,
    checkpoint: Path,
    bundles: Mapping[str, Path],
    first: str,
    failed: dict[str, str],
) -> dict[str, EngineProcess]:
    """The engines, each with its first request answered; one that fails goes into `failed`."""
    opened: dict[str, EngineProcess] = {}
    for name in trial.engines:
        if name in failed:
            continue
        kind = KINDS[name]
        source = bundles[kind.weights] if kind.ours else checkpoint
        converted = trial.work / f"{kind.module.rpartition('.')[2]}-{kind.weights}"
        order = Order(str(source), str(converted), kind.form or kind.weights, trial.threads)
        _say(f"opening {name}")
        try:
            process = EngineProcess(
                kind, order, trial.peers, trial.processors(), trial.work / f"{name}.log"
            )
            process.ask(first)
        except RuntimeError as error:
            failed[name] = str(error)
            continue
        opened[name] = process
    return opened


def ask(
    opened: Mapping[str, EngineProcess], rounds: Sequence[Round], failed: dict[str, str]
) -> Answers:
    """What the engines answer in turns; one that fails goes into `failed`."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in opened}
    for number, round_ in enumerate(rounds, start=1):
        for name in list(answers):
            try:
                answers[name].append(opened[name].ask(round_.request))
            except RuntimeError as error:
                failed[name] = str(error)
                del answers[name]
        _say(f"round {number} of {len(rounds)}")
    for process in opened.values():
        process.close()
    return answers


def compare(plan: Plan, answers: Answers) -> dict[str, dict[str, Any]]:
    """The metrics of each engine."""
    rounds = plan.rounds
    speeds = {
        name: [
            round_.utterances / a["seconds"]
            for round_, a in zip(rounds, engine_answers, strict=True)
        ]
        for name, engine_answers in answers.items()
    }
    medians = {name: statistics.median(by_round) for name, by_round in speeds.items()}

    def ratio(name: str, other: str) -> float:
        pairs = zip(speeds[name], speeds[other], strict=True)
        return round(float(statistics.median(a / b for a, b in pairs)), 2)

    compared: dict[str, dict[str, Any]] = {}
    for name, engine_answers in answers.items():
        kind = KINDS[name]
        metrics: dict[str, Any] = {"per_second": round(medians[name], 2)}
        metrics["per_second_by_round"] = [round(speed, 2) for speed in speeds[name]]
        if BASELINE in answers:
            metrics["of_baseline"] = ratio(name, BASELINE)
            metrics |= agreement(plan, name, engine_answers, answers[BASELINE])
        if kind.ours:
            peers = sorted((p for p in medians if not KINDS[p].ours), key=lambda p: -medians[p])
            same_bits = [peer for peer in peers if KINDS[peer].bits == kind.bits]
            for metric, best in (("best_peer", peers[:1]), ("best_alike", same_bits[:1])):
                for peer in best:
                    metrics |= {metric: peer, f"of_{metric}": ratio(name, peer)}
        if "token_seconds" in engine_answers[0]:
            rates = [Rate(a["token_seconds"], a["read_seconds"]) for a in engine_answers]
            shares = [
                rate.seconds(round_.needed) / a["seconds"]
                for rate, round_, a in zip(rates, rounds, engine_answers, strict=True)
            ]
            metrics["of_limit"] = round(statistics.median(shares), 3)
        compared[name] = metrics
    return compared


def agreement(
    plan: Plan,
    name: str,
    engine_answers: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Share of answers equal to those of transformers, and largest difference in probability.

    The difference is of our own probabilities alone, to the six places that are written.
    """
    if not KINDS[name].ours:
        pairs = [p for a, b in zip(engine_answers, baseline, strict=True) for p in _pairs(a, b)]
        return {"agreement": round(sum(x == y for x, y in pairs) / len(pairs), 5)}
    logits = [row for answer in baseline for row in answer["logits"]]
    expected = np.exp([plan.trie.log_probabilities([row]) for row in logits])
    rows = np.array([row for a in engine_answers for row in a["rows"]])
    return {
        "agreement": round(float((rows.argmax(-1) == expected.argmax(-1)).mean()), 5),
        "largest_difference": round(float(np.abs(rows - expected).max()), 6),
    }


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    return zip(one["tokens"], other["tokens"], strict=True)


def measure(trial: Trial, source: Path, limit: int | None) -> dict[str, Any]:
    """All metrics; `failed` maps an engine to why it has none.

    Raises:
        ErcbatchError: the dialogues cannot be used.
        RuntimeError: no bundle can be exported.
    """
    from benchmarks.lib.shapes import write_checkpoint  # torch, which only this needs

    trial.work.mkdir(parents=True, exist_ok=True)
    checkpoint = trial.work / "checkpoint"
    parameters = write_checkpoint(checkpoint, trial.model)
    failed: dict[str, str] = {}
    bundles = export(trial, checkpoint, failed)
    if not bundles:
        raise RuntimeError(f"no bundle, and so no prompts: {next(iter(failed.values()))}")
    dialogues = [dialogue for _, dialogue in islice(read_dialogues(source), limit)]
    plan = make_plan(next(iter(bundles.values())), dialogues, trial.rounds)
    opened = open_engines(trial, checkpoint, bundles, plan.first, failed)
    answers = ask(opened, plan.rounds, failed)
    compared = compare(plan, answers)
    for name, metrics in compared.items():
        metrics["versions"] = dict(opened[name].versions)
    rounds = plan.rounds
    count = sum(round_.utterances for round_ in rounds)
    return {
        "model": trial.model,
        "parameters": parameters,
        "template": trial.template,
        "demonstrations": trial.demonstrations,
        "processor": processor(),
        "threads": trial.threads,
        "rounds": trial.rounds,
        "dialogues": len(dialogues),
        "utterances": count,
        "tokens_separate": round(sum(round_.separate for round_ in rounds) / count, 1),
        "tokens_computed": round(sum(round_.computed for round_ in rounds) / count, 1),
        "tokens_needed": round(sum(round_.needed.tokens for round_ in rounds) / count, 1),
        "different_tokens": len({t for a in answers.get(BASELINE, ()) for t in a["tokens"]}),
        "engines": compared,
        "failed": failed,
    }


def processor() -> str:
    """What Linux calls the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")


def show(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a table: a row for each engine, the fastest first."""
    yield (
        f"{result['model']}, {result['utterances']} utterances, tokens an utterance: "
        f"{result['tokens_separate']} in separate prompts, {result['tokens_computed']} computed, "
        f"{result['tokens_needed']} needed; {result['threads']} threads, {result['processor']}"
    )
    yield f"{'':20}" + "".join(f"{heading:>17}" for heading in _COLUMNS.values())
    engines = result["engines"]
    for name in sorted(engines, key=lambda name: -engines[name]["per_second"]):
        yield f"{name:20}" + "".join(f"{engines[name].get(f, ''):>17}" for f in _COLUMNS)


def _say(text: str) -> None:
    click.echo(f"throughput: {text}", err=True)


def _engines(_: click.Context, __: click.Parameter, value: str | None) -> list[str]:
    if value is None:
        return [name for name, kind in KINDS.items() if kind.usual]
    for name in (names := value.split(",")):
        if name not in KINDS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(KINDS)}")
    return names


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--peers",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What peers/setup.sh was given; default: WORK/peers.",
)
@click.option("--model", default="llama-8x384", show_default=True, help="See shapes.py.")
@click.option(
    "--engines",
    callback=_engines,
    help="Which, with commas between them; default: all that run on a processor. "
    f"{BASELINE!r} is what agreement is told against.",
)
@click.option("--template", default="paper", show_default=True)
@click.option(
    "--demonstrations",
    type=click.IntRange(0, manifest.MAX_DEMONSTRATIONS),
    default=0,
    show_default=True,
    help="That each prompt shows, of the bank of the bundle mini.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", "count", type=click.IntRange(1), default=5, show_default=True)
@click.option("--dialogues", type=click.IntRange(1), help="Of INPUT at most; default: all.")
@click.option("--reuse", is_flag=True, help="Take bundles that an earlier run has left in WORK.")
def main(  # click passes a parameter for each option
    work: Path,
    source: Path,
    peers: Path | None,
    model: str,
    engines: list[str],
    template: str,
    demonstrations: int,
    threads: int,
    count: int,
    dialogues: int | None,
    reuse: bool,
) -> None:
    """Measure on the dialogues of SOURCE (JSONL), which are dealt out to the rounds.

    WORK is left with the model in every engine's form, and what the engines print.
    """
    folder, envs = work.resolve() / model, (peers or work / "peers").resolve()
    trial = Trial(folder, model, envs, engines, threads, count, demonstrations, template, reuse)
    with exit_on_errors():
        try:
            result = measure(trial, source, dialogues)
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
    for line in show(result):
        click.echo(line)
    for name, reason in result["failed"].items():
        click.echo(f"{name}: {reason}", err=True)
    click.echo(json.dumps(result))
    if result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.throughput")
