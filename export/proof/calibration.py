"""Calibration: temperatures and label offsets, and how far confidences can be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from ercbatch.bundle.metrics import Calibration, Recommendation
from ercbatch.evaluate import coverage_points, expected_calibration_error
from ercbatch.scoring.scorer import calibrated
from train.validate import Predictions

Floats = npt.NDArray[np.float64]

_FOLDS = 5
"""Parts of the validation dialogues; each is calibrated with what the others gave."""
_DRAWS = 200
_SHRINKAGE = 4.0
"""Penalty on the offsets' squares in `fit_label_shift`. docs/results.md compares other values."""
_PRECISIONS = (0.8, 0.9, 0.95)
"""For which a least confidence is recommended."""
_MIN_ANSWERED = 30
"""Utterances above a least confidence, at least, for its precision to be told."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """A temperature, and an offset for each label or none: see `ercbatch.scoring.scorer`."""

    temperature: float = 1.0
    offsets: tuple[float, ...] = ()

    def __call__(self, logs: Floats) -> Floats:
        """Probabilities [n, labels] of log probabilities [n, labels]."""
        return calibrated(logs, self.temperature, self.offsets)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The calibration of one label set over all validation data that has it."""

    scaling: Scaling
    """Fitted on all of it: what the bundle gets."""
    metrics: Calibration
    """For `bundle.json` and the card."""
    predictions: list[Predictions]
    """The datasets', each scaled by what was fitted on other dialogues."""


def calibrate_sets(
    set_predictions: Iterable[tuple[str, Predictions]], *, label_shift: bool = False
) -> dict[str, Calibrated]:
    """Label set -> its calibration, from (label set, what is said of a dataset that has it)."""
    by_label_set: dict[str, list[Predictions]] = {}
    for labels, predictions in set_predictions:
        by_label_set.setdefault(labels, []).append(predictions)
    return {
        labels: calibrate(datasets, label_shift=label_shift)
        for labels, datasets in by_label_set.items()
    }


def calibrate(predictions: Sequence[Predictions], *, label_shift: bool = False) -> Calibrated:
    """Fit the scaling of one label set on all validation data that has it.

    It is a temperature, and with `label_shift` an offset for each label too. Each dataset has the
    same weight in the fit, whatever its size, so that no domain decides alone.

    The metrics are cross-validated over dialogues in five parts: each part is scaled by what was
    fitted on the other four. If that makes the gold labels no likelier, the temperature stays 1
    and there are no offsets. `error_if_perfect` is the calibration error that true probabilities
    would have on the same number of utterances, by chance.
    """
    gold = np.concatenate([p.gold for p in predictions])
    logs = np.concatenate([p.logs for p in predictions])
    fold = np.concatenate([p.dialogue % _FOLDS for p in predictions])
    weights = np.concatenate([np.full(len(p.gold), 1 / max(1, len(p.gold))) for p in predictions])
    fit = fit_label_shift if label_shift else fit_temperature
    after = np.zeros_like(logs)
    for part in range(_FOLDS):
        held_out = fold == part
        after[held_out] = fit(logs[~held_out], gold[~held_out], weights[~held_out])(logs[held_out])
    scaling, plain = fit(logs, gold, weights), calibrated(logs, 1.0)
    if _likelihood(after, gold, weights) <= _likelihood(plain, gold, weights):
        scaling, after = Scaling(), plain
    right = after.argmax(1) == gold
    ends = np.cumsum([len(p.gold) for p in predictions])[:-1]
    return Calibrated(
        scaling,
        Calibration(
            utterances=len(gold),
            temperature=scaling.temperature,
            error_before=_error(plain, gold),
            error_after=_error(after, gold),
            error_if_perfect=_perfect_error(after),
            coverage=coverage_points(after.max(1), right),
            recommended=tuple(recommend(after.max(1), right, p) for p in _PRECISIONS),
        ),
        [
            replace(p, probabilities=part)
            for p, part in zip(predictions, np.split(after, ends), strict=True)
        ],
    )


def calibration_error(predictions: Predictions) -> float:
    """The calibration error of one dataset's answers."""
    return _error(predictions.probabilities, predictions.gold)


def scaled(predictions: Predictions, scaling: Scaling) -> Predictions:
    """A dataset's answers as a bundle with this scaling gives them."""
    return replace(predictions, probabilities=scaling(predictions.logs))


def _error(probabilities: Floats, gold: npt.NDArray[np.int64]) -> float:
    right = probabilities.argmax(1) == gold
    return round(expected_calibration_error(probabilities.max(1), right), 4)


def _perfect_error(probabilities: Floats) -> float:
    """The mean error of labels drawn from the probabilities themselves."""
    chance = np.random.default_rng(0)
    confidence = probabilities.max(1)
    errors = [
        expected_calibration_error(confidence, chance.random(len(confidence)) < confidence)
        for _ in range(_DRAWS)
    ]
    return round(float(np.mean(errors)), 4)


def recommend(confidence: Floats, right: npt.NDArray[np.bool_], precision: float) -> Recommendation:
    """The lowest `--min-confidence`, in steps of 0.01, whose answers are right that often."""
    for percent in range(100):
        answered = confidence >= percent / 100
        if answered.sum() < _MIN_ANSWERED:
            break
        if right[answered].mean() >= precision:
            share = round(float(answered.mean()), 4)
            count, correct = int(answered.sum()), int(right[answered].sum())
            return Recommendation(precision, percent / 100, share, count, correct)
    return Recommendation(precision)


def _likelihood(
    probabilities: Floats, gold: npt.NDArray[np.int64], weights: Floats | None
) -> float:
    """The mean log probability of gold labels [n], with weights [n] or without."""
    likely = probabilities[np.arange(len(gold)), gold].clip(1e-12)
    return float(np.average(np.log(likely), weights=weights)) if len(gold) else 0.0


def fit_temperature(
    logs: Floats, gold: npt.NDArray[np.int64], weights: Floats | None = None
) -> Scaling:
    """The temperature, 0.25 to 4, that makes gold labels [n] likeliest under logs [n, labels].

    `weights` [n] say how much each utterance counts; without them all count the same. The
    temperature is 1 where there are no labels.
    """
    if not len(gold):
        return Scaling()
    grid = np.exp(np.linspace(np.log(0.25), np.log(4.0), 241))
    likelihoods = [_likelihood(calibrated(logs, float(t)), gold, weights) for t in grid]
    return Scaling(round(float(grid[int(np.argmax(likelihoods))]), 4))


def fit_label_shift(
    logs: Floats, gold: npt.NDArray[np.int64], weights: Floats | None = None
) -> Scaling:
    """Fit a temperature and an offset for each label to gold labels [n] under logs [n, labels].

    This is bias-corrected temperature scaling (Alexandari et al. 2020).

    The loss, summed over the utterances, has a penalty: `_SHRINKAGE` times the sum of the offsets'
    squares. So few utterances move labels little, and a label that they lack stays possible.
    """
    if not len(gold):
        return Scaling()
    inputs, targets = torch.from_numpy(logs), torch.from_numpy(gold)
    counts = torch.ones(len(gold)) if weights is None else torch.from_numpy(weights)
    counts = counts.double() * (len(gold) / counts.sum())
    inverse_temperature = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    offsets = torch.zeros(logs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [inverse_temperature, offsets], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        losses = cross_entropy(
            inputs * inverse_temperature.exp() + offsets, targets, reduction="none"
        )
        total = (counts * losses).sum() + _SHRINKAGE * (offsets**2).sum()
        total = total / len(gold)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    temperature = float(torch.exp(-inverse_temperature.detach()).clamp(0.25, 4.0))
    return Scaling(round(temperature, 4), tuple(round(b, 4) for b in offsets.tolist()))
