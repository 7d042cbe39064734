"""How far training is: the epochs that are finished, the one that has begun, and their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from train.samples import TASKS

_METRIC_FORMATS = {
    "weighted_f1": "weighted F1 {:.2%}",
    "macro_f1": "macro {:.2%}",
    "log_loss": "log loss {:.3f}",
    "speaker_accuracy": "speakers {:.2%}",
}
"""How progress tells the metrics that it tells."""

Metrics = Mapping[str, Mapping[str, float]]
"""Name of a dataset -> its metrics."""


@dataclass(frozen=True, slots=True)
class EpochMetrics:
    """What one epoch came to.

    `losses` maps the stage's tasks to their mean losses, `valid` validation datasets to their
    metrics (see `Validation.metrics`), `train` training datasets to those on a sample of them.
    """

    epoch: int
    stage: str
    loss: float
    losses: Mapping[str, float]
    seconds: float
    tokens: int
    valid: Metrics = field(default_factory=dict)
    train: Metrics = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The score by which the best epoch is chosen.

        It is the mean weighted F1 over the validation datasets, in a stage without emotions the
        mean accuracy of the speakers.
        """
        for metric in ("weighted_f1", "speaker_accuracy"):
            values = [f[metric] for f in self.valid.values() if metric in f]
            if values:
                return sum(values) / len(values)
        return 0.0


@dataclass(slots=True)
class TrainingProgress:
    """How far a run is: finished epochs, and the epoch begun.

    `sums` are the sums of the loss and of each task's loss over the `steps` done of it.
    """

    finished: list[EpochMetrics] = field(default_factory=list)
    steps: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * (1 + len(TASKS)))
    tokens: int = 0
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """The number of the epoch begun, from 1."""
        return len(self.finished) + 1

    @property
    def means(self) -> list[float]:
        """The mean loss, and each task's, over the steps done."""
        return [value / max(1, self.steps) for value in self.sums]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingProgress:
        """Read what `to_json` gave."""
        finished = [EpochMetrics(**epoch) for epoch in value["finished"]]
        return cls(**{**value, "finished": finished})


def metrics_text(metrics: Metrics) -> str:
    """Metrics in words."""
    return "; ".join(
        f"{name}: {', '.join(words.format(f[k]) for k, words in _METRIC_FORMATS.items() if k in f)}"
        for name, f in metrics.items()
    )


def epoch_summary(metrics: EpochMetrics, epochs: int) -> str:
    """One line about a finished epoch of `epochs`."""
    parts = [f"epoch {metrics.epoch}/{epochs}: loss {metrics.loss:.4f} in {metrics.seconds:.0f} s"]
    if metrics.valid:
        parts.append(metrics_text(metrics.valid))
    if metrics.train:
        parts.append(f"training data: {metrics_text(metrics.train)}")
    return "; ".join(parts)
