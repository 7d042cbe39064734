"""Packed dialogues against one prompt per utterance: same bundle, same labels, what time?

The two take turns in one process, so a drift of the machine meets both. "Equal" compares labels
and probabilities wherever both see the same turns: separate prompts are rendered for the very
turns that the packed question sees.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from ercbatch.dialogues import Dialogue
from ercbatch.engine import Engine, in_order
from ercbatch.errors import UsageError
from ercbatch.inputs.records import read_dialogues
from ercbatch.labeler import Labeler
from ercbatch.prompts.packs import Pack, join
from ercbatch.prompts.tree import Question, Read, Segment, lay_out

Answers = dict[tuple[int, int], npt.NDArray[np.float64]]


def packed(labeler: Labeler, dialogues: list[Dialogue]) -> tuple[Answers, int]:
    """(probabilities, tokens computed) of the engine as it labels."""
    probabilities = {
        (entry.origin, t): row
        for entry in labeler.engine.run(enumerate(dialogues))
        for t, row in entry.rows.items()
    }
    return probabilities, sum(map(len, labeler.engine.packs(dialogues)))


def separate(labeler: Labeler, dialogues: list[Dialogue]) -> tuple[Answers, int]:
    """The same with one prompt, one run of the model, for each utterance, on as many threads."""
    engine = labeler.engine
    probabilities: Answers = {}

    def answer_prompt(prompt: Pack) -> list[tuple[int, int, npt.NDArray[np.float64]]]:
        return list(engine.scorer.answers(prompt, engine.renderer.trie))

    packs = [
        join([(number, lay_out(Segment(ids, read=Read(question, 0))))])
        for number, dialogue in enumerate(dialogues)
        for question, ids in prompts(engine, dialogue)
    ]
    for answers in in_order(answer_prompt, packs, engine.scorer.parallel_packs):
        for number, t, logs in answers:
            probabilities[number, t] = np.exp(logs)
    return probabilities, sum(map(len, packs))


def prompts(engine: Engine, dialogue: Dialogue) -> Iterator[tuple[Question, list[int]]]:
    """Each question that labelling asks, and the ordinary prompt with the turns that it sees.

    Raises:
        UsageError: labels begin with the same token, so that one prompt isn't enough.
    """
    if len(engine.renderer.trie.choices) > 1:
        raise UsageError("labels begin with the same token here: choose another label set")
    questions = engine.questions(dialogue)
    for question, start in engine.renderer.starts(dialogue, questions).items():
        yield question, engine.renderer.separate_prompt(dialogue, question, start=start)


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--bundle", default="mini", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(source: Path, bundle: str, threads: int, rounds: int) -> None:
    """Measure on the dialogues of SOURCE (JSONL)."""
    labeler = Labeler(bundle, threads=threads, demonstrations=0)
    dialogues = [dialogue for _, dialogue in read_dialogues(source)]
    next(labeler.label(dialogues[:1]))
    seconds: dict[str, list[float]] = {"packed": [], "separate": []}
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in labeler.label(dialogues):
            pass
        middle = time.perf_counter()
        alone, alone_tokens = separate(labeler, dialogues)
        seconds["packed"].append(middle - began)
        seconds["separate"].append(time.perf_counter() - middle)
    together, tokens = packed(labeler, dialogues)
    temperature = labeler.engine.temperature
    gaps = []
    same = 0
    for key, row in together.items():
        other = alone[key] ** (1 / temperature)
        other /= other.sum()
        gaps.append(float(np.abs(other - row).max()))
        same += int(other.argmax() == row.argmax())
    ratios = [s / p for s, p in zip(seconds["separate"], seconds["packed"], strict=True)]
    count = len(together)
    result = {
        "utterances": count,
        "packed_per_second": round(count / statistics.median(seconds["packed"]), 1),
        "separate_per_second": round(count / statistics.median(seconds["separate"]), 1),
        "speed_ratio": round(statistics.median(ratios), 2),
        "tokens_per_utterance_packed": round(tokens / count, 1),
        "tokens_per_utterance_separate": round(alone_tokens / count, 1),
        "labels_equal": round(same / count, 5),
        "largest_difference": max(gaps),
        "threads": threads,
    }
    for name, value in result.items():
        click.echo(f"{name.replace('_', ' '):32}{value}")
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.packed")
