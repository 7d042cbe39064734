"""What was measured with a bundle: the quality of its labels, and how far to trust confidences."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from ercbatch.checked import integer, mapping, number, string


@dataclass(frozen=True, slots=True)
class Quality:
    """Metrics of a bundle on one labelled dataset.

    Attributes:
        label_set: the label set that was measured.
        dataset: name of the dataset.
        utterances: utterances with a gold label.
        weighted_f1: F1 of the labels, weighted by how often each occurs.
        macro_f1: mean F1 of the labels.
        log_loss: mean −ln of the gold label's probability, not calibrated.
        calibration_error: expected calibration error with the bundle's calibration.
        calibration_weight: weight of the dataset in the fit of that calibration.
        weighted_f1_with_demonstrations: weighted F1 if each question shows three demonstrations.
        weighted_f1_original: weighted F1 of the model as it was trained.
        agreement: share of utterances that get the same label from that model.
        largest_difference: largest difference to a probability of that model.
        speed_ratio: speed divided by that model's in torch, where the bundle was exported.
    """

    label_set: str
    dataset: str
    utterances: int | None = None
    weighted_f1: float | None = None
    macro_f1: float | None = None
    accuracy: float | None = None
    log_loss: float | None = None
    calibration_error: float | None = None
    calibration_weight: float | None = None
    weighted_f1_with_demonstrations: float | None = None
    weighted_f1_original: float | None = None
    macro_f1_original: float | None = None
    agreement: float | None = None
    largest_difference: float | None = None
    speed_ratio: float | None = None

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.label_set}, {self.dataset}"

    def metrics(self) -> dict[str, int | float]:
        """The metrics that were measured, by name."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("label_set", "dataset") and value is not None
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values; metrics rounded to four places."""
        metrics = {k: round(v, 4) for k, v in self.metrics().items()}
        return {"label_set": self.label_set, "dataset": self.dataset, **metrics}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: a missing or odd value.
        """
        values = mapping(value)
        names = [f.name for f in fields(cls)][3:]  # after utterances
        count = values.get("utterances")
        return cls(
            string(values["label_set"]),
            string(values["dataset"]),
            None if count is None else integer(count),
            **{name: number(values[name]) for name in names if values.get(name) is not None},
        )


@dataclass(frozen=True, slots=True)
class CoveragePoint:
    """Answering the share `coverage` of all utterances, those with the highest confidence.

    Attributes:
        risk: share of these answers that are wrong.
        confidence: the lowest confidence among them.
    """

    coverage: float
    risk: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The `--min-confidence` at which a share `precision` of the answers is right.

    Attributes:
        min_confidence: None if no confidence reaches the precision on enough utterances.
        coverage: share of the utterances that are answered.
        answered: number of them.
        right: number of right answers.
    """

    precision: float
    min_confidence: float | None = None
    coverage: float | None = None
    answered: int = 0
    right: int = 0


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far to trust the confidences of one label set, on its validation data.

    Attributes:
        error_before: expected calibration error without the temperature.
        error_after: the same with it, cross-validated.
        error_if_perfect: the error that chance alone causes on as many utterances.
    """

    utterances: int
    temperature: float
    error_before: float
    error_after: float
    error_if_perfect: float
    coverage: tuple[CoveragePoint, ...]
    recommended: tuple[Recommendation, ...]

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what `dataclasses.asdict` made of one.

        Raises:
            KeyError, TypeError, ValueError: a missing or odd value.
        """
        values = mapping(value)
        names = ("temperature", "error_before", "error_after", "error_if_perfect")
        points = ("coverage", "risk", "confidence")
        return cls(
            integer(values["utterances"]),
            **{name: number(values[name]) for name in names},
            coverage=tuple(
                CoveragePoint(*(number(mapping(point)[name]) for name in points))
                for point in values["coverage"]
            ),
            recommended=tuple(map(_recommendation, values["recommended"])),
        )


def _recommendation(value: object) -> Recommendation:
    values = mapping(value)
    min_confidence, coverage = (
        None if values[name] is None else number(values[name])
        for name in ("min_confidence", "coverage")
    )
    counts = (integer(values.get(name, 0)) for name in ("answered", "right"))
    return Recommendation(number(values["precision"]), min_confidence, coverage, *counts)


def quality_from_json(value: object) -> tuple[Quality, ...]:
    """Read the quality of a bundle, of this format or an earlier one.

    Up to format 1.4 it is an object, in which a name such as "meld, meld-dev" joins label set and
    dataset. Metrics that are not known here are left out.

    Raises:
        KeyError, TypeError, ValueError: a missing or odd value.
    """
    if isinstance(value, list):
        return tuple(map(Quality.from_json, value))
    qualities = []
    for title, metrics in mapping(value).items():
        label_set, *dataset = re.split(r", | \(", title, maxsplit=1)
        name = dataset[0] if dataset else title
        qualities.append(
            Quality.from_json({**mapping(metrics), "label_set": label_set, "dataset": name})
        )
    return tuple(qualities)
