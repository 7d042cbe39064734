"""A bundle beside the model that it was made from: metrics of both, and what was lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ercbatch.bundle.metrics import Quality
from export.proof.measure import Measurement

UNMEASURED = "no validation data: nothing is measured"
UNCOMPARED = "it was never compared with the model that it was made from"
"""Accepted losses of a bundle without validation data: at its export, and once it is measured."""


@dataclass(frozen=True, slots=True)
class LossLimits:
    """What a bundle may lose: `f1` of weighted F1, and `agreement` with the original at least."""

    f1: float = 0.005
    agreement: float = 0.97


def compare(measurement: Measurement, original: Measurement) -> Quality:
    """The metrics of a bundle on a dataset, beside those of the model that it was made from."""
    after, before = measurement.predictions, original.predictions
    same = after.probabilities.argmax(1) == before.probabilities.argmax(1)
    return Quality(
        measurement.label_set,
        measurement.dataset,
        len(after.gold),
        **after.metrics(),
        weighted_f1_original=before.metrics()["weighted_f1"],
        macro_f1_original=before.metrics()["macro_f1"],
        agreement=float(same.mean()),
        largest_difference=float(np.abs(after.probabilities - before.probabilities).max()),
        speed_ratio=original.seconds / measurement.seconds,
    )


def losses(quality: Quality, limits: LossLimits) -> list[str]:
    """In what a bundle falls short of the original, by more than the limits allow."""
    before, after, agreement = (
        quality.weighted_f1_original,
        quality.weighted_f1,
        quality.agreement,
    )
    assert before is not None and after is not None and agreement is not None  # noqa: PT018
    messages = []
    if before - after > limits.f1:
        messages.append(
            f"{quality.title}: weighted F1 {after:.2%}, the original's is {before:.2%} (at most "
            f"{100 * limits.f1:.1f} points may go)"
        )
    if agreement < limits.agreement:
        messages.append(
            f"{quality.title}: {agreement:.1%} of the labels are the original's (at least "
            f"{limits.agreement:.0%} must be)"
        )
    return messages
