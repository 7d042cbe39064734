"""What a bundle is and what was measured with it, for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ercbatch.bundle.manifest import BundleInfo
from ercbatch.bundle.metrics import Calibration, Quality, Recommendation
from ercbatch.terminal.streams import printable

METRICS: Mapping[str, tuple[str, str]] = {
    "utterances": ("utterances with a gold label", "{:,}"),
    "weighted_f1": ("weighted F1: the labels' F1, weighted by how often each occurs", "{:.2%}"),
    "macro_f1": ("macro F1: the plain mean of the labels' F1", "{:.2%}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "log_loss": ("log loss: mean −ln of the gold label's probability, uncalibrated", "{:.4f}"),
    "calibration_error": ("calibration error with the temperature of its label set", "{:.3f}"),
    "calibration_weight": ("its weight in the fit of that temperature", "{:.0%}"),
    "weighted_f1_with_demonstrations": ("weighted F1 with three demonstrations shown", "{:.2%}"),
    "weighted_f1_original": ("weighted F1 of the model as it was trained", "{:.2%}"),
    "macro_f1_original": ("its macro F1", "{:.2%}"),
    "agreement": ("utterances that get the same label as from that model", "{:.1%}"),
    "largest_difference": ("largest difference of a probability from that model's", "{:.4f}"),
    "speed_ratio": ("times as fast as that model in torch, where it was exported", "{:.2f}"),
}
"""Metric of `Quality` -> what it is, and its format."""


def format_metric(name: str, value: float) -> str:
    """The value of a metric for people."""
    return METRICS[name][1].format(value)


def describe(folder: Path, info: BundleInfo) -> str:
    """What a bundle is."""
    window, later = info.window, info.later_turns
    both = f"{later} later turns" if later else "not trained"
    rows = [
        ("bundle", f"{info.name}, in {folder}"),
        ("written by", f"ercbatch {info.version}, format {info.format}"),
        ("base", info.base),
        ("quantization", info.quantization),
        *(("label set", f"{s.name}: {', '.join(s.labels)}") for s in info.label_sets),
        ("template", f"{info.template}, version {info.template_version}"),
        (
            "window",
            f"{window.turns} earlier turns, stride {window.stride}, {window.max_tokens} tokens; "
            f"--context both: {both}",
        ),
        ("demonstrations", f"{info.demonstrations} a question"),
        *(("data", source) for source in info.data),
        ("licence", info.licence),
        *(("accepted loss", loss) for loss in info.accepted_loss),
        *(
            ("confidence", f"{name}: {_format_calibration(calibration)}")
            for name, calibration in info.calibration.items()
        ),
        *(("measured", f"{quality.title}: {_format_quality(quality)}") for quality in info.quality),
        *(("file", f"{name}, {digest.size:,} bytes") for name, digest in info.files.items()),
    ]
    return "\n".join(f"{name + ':':16}{printable(value)}" for name, value in rows)


def _format_calibration(calibration: Calibration) -> str:
    """The lowest confidences that a label set's calibration recommends."""
    return "; ".join(map(_format_recommendation, calibration.recommended))


def _format_recommendation(recommendation: Recommendation) -> str:
    precision = f"{recommendation.precision:.0%} right"
    if recommendation.min_confidence is None:
        return f"{precision}: not reached"
    if recommendation.min_confidence == 0:
        return f"{precision}: by all answers"
    option = f"--min-confidence {recommendation.min_confidence:.2f}"
    return f"{precision}: {option} answers {recommendation.coverage:.0%}"


def _format_quality(quality: Quality) -> str:
    formats = {
        "utterances": "{} utterances",
        "weighted_f1": "weighted F1 {}",
        "macro_f1": "macro F1 {}",
        "agreement": "{} labelled as by the model that was trained",
    }
    metrics = quality.metrics()
    return ", ".join(
        text.format(format_metric(name, metrics[name]))
        for name, text in formats.items()
        if name in metrics
    )
