"""How good labels are, against gold labels in the same file.

The figures are scikit-learn's, in numpy: at run time it would weigh more than all the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ercbatch.bundle.metrics import CoveragePoint
from ercbatch.dialogues import parse_dialogue
from ercbatch.errors import InputError, RecordError
from ercbatch.labels import LabelSet, label_set, label_set_names
from ercbatch.terminal.streams import printable

_BINS = 15
_COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True, slots=True)
class LabelMetrics:
    """Figures of one label, 0 to 1; `support` counts its gold utterances."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures between 0 and 1 over the utterances that have text and a gold label.

    The others are only counted, in `unlabelled`. Macro F1 is the mean over the labels that occur
    in gold. An abstention (no emotion for a text with a gold label) counts as a wrong answer.
    `ece` is the expected calibration error over 15 equal bins of confidence, of the answered
    utterances.
    """

    labels: tuple[str, ...]
    utterances: int
    unlabelled: int
    abstained: int
    weighted_f1: float
    macro_f1: float
    accuracy: float
    ece: float
    per_label: Mapping[str, LabelMetrics]
    confusion: npt.NDArray[np.int64]
    """Gold in rows, predicted in columns, in the order of `labels`."""
    coverage: tuple[CoveragePoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "weighted_f1": self.weighted_f1,
            "macro_f1": self.macro_f1,
            "accuracy": self.accuracy,
            "ece": self.ece,
            "per_label": {
                name: {
                    "precision": f.precision,
                    "recall": f.recall,
                    "f1": f.f1,
                    "support": f.support,
                }
                for name, f in self.per_label.items()
            },
            "confusion": self.confusion.tolist(),
            "labels": list(self.labels),
            "utterances": self.utterances,
            "unlabelled": self.unlabelled,
            "abstained": self.abstained,
            "coverage": [
                {"coverage": p.coverage, "risk": p.risk, "confidence": p.confidence}
                for p in self.coverage
            ],
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """One utterance: gold label, predicted label or None, and its confidence."""

    gold: str
    predicted: str | None
    confidence: float


def read_predictions(records: Iterable[Mapping[str, Any]]) -> Iterator[Prediction | None]:
    """The utterances of labelled records; None for one without a gold label or without text.

    Raises:
        InputError: a record that `ercbatch label` did not write.
    """
    for number, record in enumerate(records, start=1):
        try:
            dialogue = parse_dialogue(record)
        except RecordError as error:
            raise InputError(f"dialogue {number}: {error.reason}: mend or remove it") from error
        for utterance, turn in zip(dialogue.utterances, dialogue.turns, strict=True):
            emotion, confidence = turn.get("emotion", 0), turn.get("confidence")
            if emotion is not None and not isinstance(emotion, str):
                raise InputError(
                    f"dialogue {number}: an utterance has no `emotion`: run `ercbatch label` first"
                )
            if utterance.blank or not (utterance.label or "").strip():
                yield None
            elif isinstance(confidence, int | float) and 0 <= confidence <= 1:
                yield Prediction(utterance.label or "", emotion, float(confidence))
            else:
                raise InputError(
                    f"dialogue {number}: the confidence of an emotion is {confidence!r}, not "
                    "between 0 and 1: run `ercbatch label` again"
                )


def guess_label_set(predictions: Sequence[Prediction]) -> LabelSet:
    """The smallest built-in label set that all predictions and gold labels belong to.

    Predictions belong under the set's own names, gold labels under any spelling that it knows.
    Where none fits, the labels found are the set.
    """
    predicted = {p.predicted for p in predictions if p.predicted is not None}
    gold = {p.gold for p in predictions}
    candidates = [
        s
        for s in map(label_set, label_set_names())
        if predicted <= set(s.labels) and all(s.canonical(label) for label in gold)
    ]
    if candidates:
        return min(candidates, key=len)
    # The same label in other letters is one label, under the name that predictions give it.
    names = {name.casefold(): name for name in (*sorted(gold), *sorted(predicted))}
    labels = tuple(sorted(names.values()))
    return LabelSet("labels of the file", labels if len(labels) > 1 else (*labels, "(other)"))


def evaluate(records: Iterable[Mapping[str, Any]], labels: LabelSet | None = None) -> Evaluation:
    """Evaluate labelled records that have gold labels.

    Raises:
        InputError: no gold label at all, one outside the label set, or unlabelled records.
    """
    utterances = list(read_predictions(records))
    predictions = [p for p in utterances if p is not None]
    if not predictions:
        raise InputError("no utterance has a gold `label`: there is nothing to evaluate")
    labels = labels or guess_label_set(predictions)
    gold = np.array([_index(labels, p.gold) for p in predictions])
    predicted = np.array(
        [-1 if p.predicted is None else _index(labels, p.predicted) for p in predictions]
    )
    confidence = np.array([p.confidence for p in predictions])
    return evaluation(labels, gold, predicted, confidence, len(utterances) - len(predictions))


def _index(labels: LabelSet, name: str) -> int:
    label = labels.canonical(name)
    if label is None:
        raise InputError(
            f"label {name!r} is not in the label set {labels.name} ({', '.join(labels.labels)}): "
            "name the right one with --label-set"
        )
    return labels.index(label)


def f1_metrics(
    gold: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], labels: int
) -> tuple[float, float, float]:
    """(weighted F1, macro F1, accuracy) of label indices [n]; -1 is an abstention."""
    f1, _, _, support, _ = _per_label(gold, predicted, labels)
    present = support > 0
    return (
        float((f1 * support).sum() / support.sum()),
        float(f1[present].mean()),
        float((gold == predicted).mean()),
    )


def _per_label(gold: Any, predicted: Any, labels: int) -> tuple[Any, Any, Any, Any, Any]:
    confusion = np.zeros((labels, labels), dtype=np.int64)
    answered = predicted >= 0
    np.add.at(confusion, (gold[answered], predicted[answered]), 1)
    support = np.bincount(gold, minlength=labels)
    right = np.diag(confusion)
    precision = right / np.maximum(confusion.sum(0), 1)
    recall = right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(confusion.sum(0) + support, 1)
    return f1, precision, recall, support, confusion


def expected_calibration_error(
    confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]
) -> float:
    """Mean gap between confidence and accuracy over 15 equal bins (Naeini et al. 2015)."""
    if not len(confidence):
        return 0.0
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).sum()
        for b in np.unique(bins)
    ]
    return float(sum(gaps) / len(confidence))


def evaluation(
    labels: LabelSet,
    gold: npt.NDArray[np.int64],
    predicted: npt.NDArray[np.int64],
    confidence: npt.NDArray[np.float64],
    unlabelled: int = 0,
) -> Evaluation:
    """The evaluation of label indices [n]; a prediction of -1 is an abstention."""
    f1, precision, recall, support, confusion = _per_label(gold, predicted, len(labels))
    weighted, macro, accuracy = f1_metrics(gold, predicted, len(labels))
    answered = predicted >= 0
    right = gold == predicted
    return Evaluation(
        labels=labels.labels,
        utterances=len(gold),
        unlabelled=unlabelled,
        abstained=int((~answered).sum()),
        weighted_f1=weighted,
        macro_f1=macro,
        accuracy=accuracy,
        ece=expected_calibration_error(confidence[answered], right[answered]),
        per_label={
            name: LabelMetrics(float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
            for i, name in enumerate(labels.labels)
        },
        confusion=confusion,
        coverage=coverage_points(confidence, right, answered),
    )


def coverage_points(
    confidence: npt.NDArray[np.float64],
    right: npt.NDArray[np.bool_],
    answered: npt.NDArray[np.bool_] | None = None,
) -> tuple[CoveragePoint, ...]:
    """Coverage against risk of answers [n], the surest first, by default all of them answered.

    Abstentions come last and count as errors, so the points beyond the share answered say little.
    """
    abstained = np.zeros(len(right), bool) if answered is None else ~answered
    order = np.lexsort((-confidence, abstained))
    wrong_so_far = np.cumsum(~right[order])
    points = []
    for coverage in _COVERAGES:
        count = max(1, round(coverage * len(order)))
        risk = float(wrong_so_far[count - 1] / count)
        points.append(CoveragePoint(coverage, risk, float(confidence[order[count - 1]])))
    return tuple(points)


def print_evaluation(results: Evaluation, console: Console | None = None) -> None:
    """Print the tables of an evaluation (by default to stdout)."""
    # Labels come from the file: they are neither markup nor terminal controls.
    console = console or Console(highlight=False, markup=False)
    names = [printable(name) for name in results.labels]
    # rich cuts a table to the width, and takes a pipe for 80 columns.
    console.width = max(console.width, max(map(len, names)) + 12 * len(names))
    answered = results.utterances - results.abstained
    summary = f"{answered / results.utterances:.1%} answered"
    if results.abstained:
        right = results.accuracy * results.utterances / max(1, answered)
        summary += f", {right:.1%} of them right; what is not answered counts as wrong below"
    console.print(
        f"{results.utterances:,} utterances ({results.unlabelled:,} more without gold label or "
        f"text), {summary}\n"
        f"weighted F1 {results.weighted_f1:.2%}   macro F1 {results.macro_f1:.2%}   "
        f"accuracy {results.accuracy:.2%}   calibration error {results.ece:.3f}",
        soft_wrap=True,
    )
    per_label = _table("By label", "label", "precision", "recall", "F1", "gold")
    for name, f in zip(names, results.per_label.values(), strict=True):
        shares = (f"{value:.1%}" for value in (f.precision, f.recall, f.f1))
        per_label.add_row(name, *shares, f"{f.support:,}")
    confusion = _table("Gold in rows, predicted in columns", "", *(name[:9] for name in names))
    for name, row in zip(names, results.confusion, strict=True):
        confusion.add_row(name, *(str(count) for count in row))
    coverage = _table("Answering only the surest", "coverage", "wrong", "--min-confidence")
    for point in results.coverage:
        if round(point.coverage * results.utterances) > answered:
            continue  # beyond what was answered
        coverage.add_row(f"{point.coverage:.0%}", f"{point.risk:.1%}", f"{point.confidence:.3f}")
    for table in (per_label, confusion, coverage):
        console.print()
        console.print(table)


def _table(title: str, first_column: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(first_column, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
