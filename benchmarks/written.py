"""The written dialogues: how many, which labels, how far two labellers agree, what is repeated.

An utterance has a `label` where the writer and the second labeller agree, and otherwise `labels`,
the writer's first. Cohen's kappa compares their agreement with that of chance.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ercbatch.inputs.records import read_dialogues
from ercbatch.labels import LabelSet, label_set

FOLDER = Path(__file__).resolve().parent.parent / "train" / "data"
PARTS = ("train", "valid", "held-out")
LABELS = label_set("ekman")
_PHRASE = 5
"""Words in a phrase that no two dialogues should share."""

Record = Mapping[str, Any]
Pair = tuple[str, str]


def part(name: str) -> Path:
    """The file of one part of the written dialogues."""
    return FOLDER / f"written-{name}.jsonl"


def records(path: Path) -> list[Record]:
    """The dialogue records of a file."""
    return [dialogue.record for _, dialogue in read_dialogues(path)]


def pairs(record: Record) -> Iterator[Pair]:
    """The writer's label and the second label of each utterance."""
    for turn in record["utterances"]:
        first, second = turn.get("labels", (turn.get("label"),) * 2)
        yield first, second


def kappa(labelled: Sequence[Pair], labels: LabelSet) -> float:
    """Cohen's kappa of the two labellers."""
    total = len(labelled)
    same = sum(first == second for first, second in labelled) / total
    firsts, seconds = (Counter(pair[i] for pair in labelled) for i in (0, 1))
    chance = sum(firsts[label] * seconds[label] for label in labels.labels) / total**2
    return (same - chance) / (1 - chance)


def repeated_phrases(dialogues: Sequence[Record]) -> Counter[str]:
    """Phrases of five words that stand in several dialogues, and in how many."""
    counts: Counter[str] = Counter()
    for record in dialogues:
        phrases = set()
        for turn in record["utterances"]:
            words = re.findall(r"[\w'’]+", turn["text"].lower())
            phrases |= {" ".join(words[i : i + _PHRASE]) for i in range(len(words) - _PHRASE + 1)}
        counts.update(phrases)
    return Counter({phrase: count for phrase, count in counts.items() if count > 1})


@dataclass(frozen=True, slots=True)
class Row:
    """One setting of one part: counts, the share of neutral, and the two labellers' agreement."""

    part: str
    setting: str
    dialogues: int
    utterances: int
    neutral: float
    agreement: float
    kappa: float


def row(name: str, setting: str, dialogues: Sequence[Record]) -> Row:
    """The figures of some dialogues."""
    labelled = [pair for record in dialogues for pair in pairs(record)]
    return Row(
        name,
        setting,
        len(dialogues),
        len(labelled),
        sum(first == "neutral" for first, _ in labelled) / len(labelled),
        sum(first == second for first, second in labelled) / len(labelled),
        kappa(labelled, LABELS),
    )


@click.command()
@click.option("--phrases", default=10, show_default=True, help="Repeated phrases to print.")
def main(phrases: int) -> None:
    """Print what is known of the written dialogues in train/data."""
    rows, all_records = [], []
    for name in PARTS:
        part_records = records(part(name))
        all_records += part_records
        settings: dict[str, list[Record]] = {}
        for record in part_records:
            settings.setdefault(record["setting"], []).append(record)
        rows += [
            row(name, setting, setting_records)
            for setting, setting_records in sorted(settings.items())
        ]
        rows.append(row(name, "all", part_records))
    total = row("all", "all", all_records)
    for r in (*rows, total):
        print(
            f"{r.part:9}{r.setting:13}{r.dialogues:6,} dialogues {r.utterances:7,} utterances  "
            f"neutral {r.neutral:4.0%}  agreement {r.agreement:6.1%}  kappa {r.kappa:.3f}"
        )
    labelled = [pair for record in all_records for pair in pairs(record)]
    for label in LABELS.labels:
        first = sum(pair[0] == label for pair in labelled)
        both = sum(pair == (label, label) for pair in labelled)
        print(f"{label:9}{first:7,} utterances, {both / max(1, first):.0%} of them confirmed")
    repeated = repeated_phrases(all_records)
    for phrase, count in repeated.most_common(phrases):
        print(f"{count:4} dialogues have: {phrase}")
    summary = {
        "dialogues": total.dialogues,
        "utterances": total.utterances,
        "agreement": round(total.agreement, 4),
        "kappa": round(total.kappa, 4),
        "repeated_phrases": len(repeated),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
