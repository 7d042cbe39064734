"""What an utterance costs as dialogues grow longer, as they grow more, and on more threads.

    python -m benchmarks.scaling [BUNDLE]

Sentences are invented, and dialogues of every length say the same ones in the same order: turns are
as long on average whatever the length. Every case runs in a process of its own, the cases of a
group in turns, so that a drift of the machine meets all of them. Memory is the peak of what is
resident in the process (Linux), in MB of 10^6 bytes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import click

from benchmarks.lib.options import numbers
from benchmarks.lib.sentences import converse, invent
from benchmarks.lib.workers import Worker
from ercbatch.dialogues import Dialogue
from ercbatch.scoring.threads import available_threads
from ercbatch.terminal.stopping import exit_on_errors

_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_COUNTS = (100, 1_000, 10_000)
_FLAT_FROM = 10
"""Turns from which the cost of an utterance should no longer change: the window is full."""
_TURNS = 10
"""Of a dialogue, where other things than its length are measured."""
_SENTENCES = 5_000
"""Distinct ones; a longer stream begins again, so that the stream itself takes no memory."""


@dataclass(frozen=True, slots=True)
class Case:
    """What one process labels, whenever it is asked to."""

    bundle: str
    turns: int
    dialogues: int
    threads: int

    @property
    def utterances(self) -> int:
        """How many there are in all."""
        return self.turns * self.dialogues

    def stream(self) -> Iterator[Dialogue]:
        """The dialogues, one at a time."""
        texts = [d.text for d in invent(min(self.utterances, _SENTENCES))]
        return converse(islice(cycle(texts), self.utterances), self.turns)


def measure(cases: Mapping[str, Case], rounds: int) -> dict[str, dict[str, float]]:
    """Metrics of each case, by name; the cases take turns.

    Raises:
        UsageError: the bundle cannot be opened, or a process ends.
    """
    workers = {}
    with ExitStack() as stack:
        for name, case in cases.items():
            workers[name] = Worker(case.bundle, case.threads, case.stream)
            stack.callback(workers[name].close)
        for _ in range(rounds):
            for worker in workers.values():
                worker.round()
    return {
        name: {
            "utterances": cases[name].utterances,
            "ms_per_utterance": round(
                1e3 * statistics.median(worker.seconds) / cases[name].utterances, 4
            ),
            "resident_mb": round(worker.peak.resident, 1),
        }
        for name, worker in workers.items()
    }


def spread(lengths: Mapping[str, Mapping[str, float]]) -> float | None:
    """Extra cost of the most expensive length over the cheapest; 0.1 is 10 %.

    Only lengths from `_FLAT_FROM` turns count. None if there are fewer than two.
    """
    costs = [f["ms_per_utterance"] for turns, f in lengths.items() if int(turns) >= _FLAT_FROM]
    return round(max(costs) / min(costs) - 1, 4) if len(costs) > 1 else None


def show(title: str, cases: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The lines of a group's table."""
    yield f"{title:>12}{'utterances':>14}{'ms each':>10}{'per second':>12}{'resident, MB':>15}"
    for name, metrics in cases.items():
        cost = metrics["ms_per_utterance"]
        yield (
            f"{name:>12}{metrics['utterances']:>14,}{cost:>10.3f}{1e3 / cost:>12.1f}"
            f"{metrics['resident_mb']:>15.1f}"
        )


def _list(values: Sequence[int]) -> str:
    return ",".join(str(value) for value in values)


@click.command()
@click.argument("bundle", default="mini")
@click.option("--lengths", default=_list(_LENGTHS), show_default=True, callback=numbers(1))
@click.option("--dialogues", default=_list(_COUNTS), show_default=True, callback=numbers(1))
@click.option(
    "--utterances",
    type=click.IntRange(1),
    default=4_000,
    show_default=True,
    help="In all, at each length: a multiple of every length.",
)
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="But where they vary."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
def main(
    bundle: str,
    lengths: list[int],
    dialogues: list[int],
    utterances: int,
    threads: int,
    rounds: int,
) -> None:
    """Measure how the cost of BUNDLE grows."""
    for turns in lengths:
        if utterances % turns:
            raise click.BadParameter(f"{utterances} utterances make no dialogues of {turns} turns")
    groups = {
        "turns": {str(n): Case(bundle, n, utterances // n, threads) for n in lengths},
        "dialogues": {str(n): Case(bundle, _TURNS, n, threads) for n in dialogues},
        "threads": {
            str(n): Case(bundle, _TURNS, max(1, utterances // _TURNS), n)
            for n in sorted({1, 2, available_threads()})
        },
    }
    result: dict[str, Any] = {"bundle": bundle, "threads_otherwise": threads, "rounds": rounds}
    for title, cases in groups.items():
        with exit_on_errors():
            result[title] = measure(cases, rounds)
        for line in show(title, result[title]):
            click.echo(line)
    result["spread"] = spread(result["turns"])
    one, two = (result["threads"][n]["ms_per_utterance"] for n in ("1", "2"))
    result["two_threads_ratio"] = round(one / two, 3)
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.scaling")
