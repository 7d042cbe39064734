"""Does a label depend on what else is labelled? Dialogues alone, and amid others.

    python -m benchmarks.neighbours INPUT

Each dialogue is labelled alone, on one thread. Then, again and again, some of them are labelled
together: which, in which order, how many tokens share a pack, and on how many threads is drawn.
What is compared are the probabilities of each utterance's labels, before they are rounded for the
output.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from ercbatch.dialogues import Dialogue
from ercbatch.engine import Engine
from ercbatch.errors import UsageError
from ercbatch.inputs.records import read_dialogues
from ercbatch.labeler import Labeler
from ercbatch.scoring.sessions import LONGEST_PACK
from ercbatch.terminal.stopping import exit_on_errors

Rows = dict[int, npt.NDArray[np.float64]]
"""Utterance -> its probabilities [labels]."""
THREADS = (1, 2, 3)


@dataclass(slots=True)
class Comparison:
    """What came of comparing so many utterances with the same ones labelled alone."""

    compared: int = 0
    other_labels: int = 0
    not_to_the_last_bit: int = 0
    largest_difference: float = 0.0
    """Of two probabilities of one label."""

    def add(self, rows: Rows, alone: Rows) -> None:
        """Compare the utterances of a dialogue."""
        assert rows.keys() == alone.keys()
        for t, row in rows.items():
            self.compared += 1
            self.other_labels += int(row.argmax() != alone[t].argmax())
            self.not_to_the_last_bit += int(not np.array_equal(row, alone[t]))
            gap = float(np.abs(row - alone[t]).max())
            self.largest_difference = max(self.largest_difference, gap)


class Company:
    """The same dialogues, again and again, in other company."""

    def __init__(self, labelers: Sequence[Labeler], dialogues: Sequence[Dialogue]) -> None:
        self._engines = [labeler.engine for labeler in labelers]
        self._dialogues = dialogues
        self._alone = [
            self._rows(self._engines[0], [number])[0] for number in range(len(dialogues))
        ]

    def _rows(self, engine: Engine, order: Sequence[int]) -> list[Rows]:
        return [entry.rows for entry in engine.run((n, self._dialogues[n]) for n in order)]

    def compare(
        self, comparison: Comparison, order: Sequence[int], pack_tokens: int, labeler: int
    ) -> None:
        """Label dialogues in this order and packs of such a size, with one of the labelers."""
        engine = replace(self._engines[labeler], pack_tokens=pack_tokens)
        for number, rows in zip(order, self._rows(engine, order), strict=True):
            comparison.add(rows, self._alone[number])


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--bundle", default="mini", show_default=True)
@click.option("--label-set", help="One of the bundle's; default: its first.")
@click.option("--demos", type=int, default=0, show_default=True, help="Shown with each question.")
@click.option(
    "--dialogues", type=click.IntRange(2), default=200, show_default=True, help="At most."
)
@click.option("--trials", type=click.IntRange(1), default=200, show_default=True)
@click.option(
    "--pack-tokens",
    type=click.IntRange(2),
    default=LONGEST_PACK,
    show_default=True,
    help="Drawn up to this; a tree that has more is a pack of its own.",
)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    source: Path,
    bundle: str,
    label_set: str | None,
    demos: int,
    dialogues: int,
    trials: int,
    pack_tokens: int,
    seed: int,
) -> None:
    """Label the dialogues of SOURCE (JSONL) in company that is drawn."""
    draw = random.Random(seed)
    with exit_on_errors():
        sample = [dialogue for _, dialogue in read_dialogues(source)]
        if len(sample) < 2:
            raise UsageError(f"{source}: one dialogue has no neighbours: give more")
        sample = draw.sample(sample, min(dialogues, len(sample)))
        labelers = [
            Labeler(bundle, label_set=label_set, demonstrations=demos, threads=n) for n in THREADS
        ]
        company, comparison = Company(labelers, sample), Comparison()
        for _ in range(trials):
            order = draw.sample(range(len(sample)), draw.randint(2, min(30, len(sample))))
            # Small packs as often as large ones.
            tokens = int(2 ** draw.uniform(0, math.log2(pack_tokens)))
            company.compare(comparison, order, tokens, draw.randrange(len(THREADS)))
    result = {
        "bundle": bundle,
        "form": labelers[0].bundle.info.form,
        "demonstrations": demos,
        "dialogues": len(sample),
        "trials": trials,
        "pack_tokens": pack_tokens,
        "utterances_compared": comparison.compared,
        "other_labels": comparison.other_labels,
        "not_to_the_last_bit": comparison.not_to_the_last_bit,
        "largest_difference": comparison.largest_difference,
    }
    for key, value in result.items():
        click.echo(f"{key:>20}  {value}")
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.neighbours")
