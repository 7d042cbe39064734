"""What a bundle is measured by: losses against the original, calibration, least confidences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ercbatch.scoring.scorer import calibrated
from export.proof.calibration import (
    Scaling,
    calibrate,
    fit_label_shift,
    fit_temperature,
    recommend,
)
from export.proof.losses import LossLimits, compare, losses
from export.proof.measure import Measurement
from train.validate import Predictions

pytestmark = pytest.mark.transformers

LABELS = 5


def drawn(count: int, temperature: float, seed: int = 0) -> Predictions:
    """Probabilities that are true at `temperature`, ten utterances a dialogue."""
    random = np.random.default_rng(seed)
    logs = np.log(random.dirichlet(np.ones(LABELS), count))
    gold = [random.choice(LABELS, p=p) for p in calibrated(logs, temperature)]
    return Predictions(np.array(gold), np.exp(logs), np.arange(count) // 10)


def test_a_temperature_is_found_again() -> None:
    result = drawn(20_000, 1.7)
    fitted = fit_temperature(np.log(result.probabilities), result.gold)
    assert fitted.temperature == pytest.approx(1.7, rel=0.05)
    assert fit_temperature(np.empty((0, LABELS)), np.empty(0, np.int64)) == Scaling()


def test_label_shift_finds_how_common_labels_are() -> None:
    random = np.random.default_rng(3)
    logs = np.log(random.dirichlet(np.ones(LABELS), 4000))
    common = np.array([2.0, 0, 0, 0, -1])
    gold = np.array([random.choice(LABELS, p=p) for p in calibrated(logs, 1.5, common.tolist())])
    result = fit_label_shift(logs, gold)
    assert result.temperature == pytest.approx(1.5, rel=0.1)
    offsets = np.array(result.offsets)
    assert offsets - offsets.mean() == pytest.approx(common - common.mean(), abs=0.2)
    # Few utterances move the labels little, and a label that they lack stays possible.
    few = fit_label_shift(logs[:20], np.zeros(20, np.int64))
    assert max(map(abs, few.offsets)) < 2
    assert fit_label_shift(logs[:0], gold[:0]) == Scaling()
    twice = [Predictions(gold, np.exp(logs), np.arange(4000) // 10)] * 2
    shifted, plain = calibrate(twice, label_shift=True), calibrate(twice)
    assert (len(shifted.scaling.offsets), plain.scaling.offsets) == (LABELS, ())
    assert shifted.predictions[1].metrics()["accuracy"] > twice[1].metrics()["accuracy"] + 0.05
    assert plain.predictions[1].metrics()["accuracy"] == twice[1].metrics()["accuracy"]


def test_calibration_error_is_cross_validated() -> None:
    result = calibrate([drawn(1000, 2.0, seed) for seed in range(3)]).metrics
    assert result.utterances == 3000
    assert result.temperature == pytest.approx(2.0, rel=0.1)
    assert result.error_before > 0.1
    # True probabilities have an error too: that of chance.
    assert 0.01 < result.error_if_perfect < 0.03
    assert result.error_after < result.error_if_perfect + 0.015
    risks = [point.risk for point in result.coverage]
    assert result.coverage[0].coverage == 1.0
    assert risks[-1] < risks[0]
    assert [r.precision for r in result.recommended] == [0.8, 0.9, 0.95]


def test_each_dataset_has_the_same_weight_in_the_temperature() -> None:
    large, small = drawn(8000, 3.0), drawn(500, 0.8, seed=1)
    result = calibrate([large, small]).scaling.temperature
    twice = calibrate([drawn(500, 3.0, seed=2), small]).scaling.temperature
    assert result == pytest.approx(twice, rel=0.1)
    assert result < 0.8 * calibrate([large]).scaling.temperature


def test_temperature_that_does_not_help_is_not_kept() -> None:
    result = [calibrate([drawn(60, 1.0, seed)]).metrics for seed in range(12)]
    left = [f for f in result if f.temperature == 1.0]
    assert 0 < len(left) < 12
    assert all(f.error_after == f.error_before for f in left)


def test_a_single_dialogue_is_not_calibrated_by_itself() -> None:
    one = drawn(10, 3.0)
    result = calibrate([one]).metrics
    assert result.error_after == result.error_before


def test_the_least_confidence_is_the_lowest_that_reaches_a_precision() -> None:
    confidence = np.repeat([0.95, 0.75, 0.5], 100)
    right = np.concatenate([np.arange(100) < share for share in (96, 80, 40)])
    assert recommend(confidence, right, 0.70).min_confidence == 0.0
    high = recommend(confidence, right, 0.95)
    assert (high.min_confidence, high.coverage) == (0.76, 0.3333)
    assert (high.answered, high.right) == (100, 96)
    middle = recommend(confidence, right, 0.85)
    assert (middle.min_confidence, middle.coverage) == (0.51, 0.6667)
    assert recommend(confidence, right, 0.99).min_confidence is None
    # Of few answers nothing can be told.
    assert recommend(confidence[:20], np.ones(20, bool), 0.8).min_confidence is None


def test_losses_are_named() -> None:
    original = Measurement("meld", "chats", drawn(1000, 1.0), 2.0)
    same = compare(replace(original, seconds=1.0), original)
    assert (same.agreement, same.largest_difference, same.speed_ratio) == (1.0, 0.0, 2.0)
    assert losses(same, LossLimits()) == []
    worse = original.predictions.probabilities.copy()
    worse[:100] = np.roll(worse[:100], 1, axis=1)
    predictions = replace(original.predictions, probabilities=worse)
    result = compare(replace(original, predictions=predictions), original)
    assert result.agreement == 0.9
    lost, different = losses(result, LossLimits())
    assert lost.startswith("meld, chats: weighted F1 ")
    assert "90.0% of the labels are the original's (at least 97% must be)" in different
    assert losses(result, LossLimits(f1=1.0, agreement=0.9)) == []
