"""The model card of a bundle: what was measured, in the form of Hugging Face's model cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ercbatch.bundle import manifest
from ercbatch.bundle.manifest import BundleInfo
from ercbatch.bundle.metrics import Calibration, Recommendation
from ercbatch.terminal.show import METRICS, format_metric

_METRICS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "weighted_f1": ("f1", {"average": "weighted"}),
    "macro_f1": ("f1", {"average": "macro"}),
    "accuracy": ("accuracy", {}),
}
"""Metric -> what the `evaluate` library calls it, and its arguments."""
_LICENCES = frozenset(
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause gpl gpl-2.0 gpl-3.0 lgpl lgpl-3.0 agpl-3.0 "
    "mpl-2.0 cc cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "openrail bigscience-openrail-m bigscience-bloom-rail-1.0 llama2 llama3 llama3.1 llama3.2 "
    "llama3.3 llama4 gemma unknown".split()
)
"""Of Hugging Face's licence identifiers, those that language models and dialogues come under."""
_SCOPE_NOTE = (
    "Nothing else was measured: not other kinds of conversation, nor other languages. "
    "`ercbatch evaluate` measures a labelled file that has gold labels, and "
    "`python -m export calibrate` fits the confidences to your own dialogues."
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card_data(info: BundleInfo) -> ModelCardData:
    """The metadata of a card: licence, base, and the figures as a model index."""
    results = [
        EvalResult(
            task_type="text-classification",
            task_name="Emotion recognition in conversation",
            dataset_type=quality.label_set,
            dataset_name=quality.title,
            dataset_config=quality.dataset,  # tells two of one label set apart
            metric_type=metric,
            metric_name=name.replace("_", " "),
            metric_value=round(quality.metrics()[name], 4),
            metric_args=dict(arguments) or None,
        )
        for quality in info.quality
        for name, (metric, arguments) in _METRICS.items()
        if name in quality.metrics()
    ]
    licence = "-".join(info.licence.partition(" (")[0].lower().split())  # after it: explanations
    is_hub_licence = licence in _LICENCES
    return ModelCardData(
        model_name=info.name,
        license=licence if is_hub_licence else "other",
        license_name=None if is_hub_licence else licence,
        base_model=info.base if _HUB_ID.fullmatch(info.base) else None,
        library_name="ercbatch",
        pipeline_tag="text-classification",
        tags=["emotion-recognition-in-conversation", info.form],
        eval_results=results or None,
    )


def write_card(info: BundleInfo, folder: Path) -> None:
    """Write the card, and its metadata as JSON, into a folder.

    Raises:
        OSError: they cannot be written.
    """
    (folder / manifest.CARD).write_text(card(info), encoding="utf-8")
    (folder / manifest.CARD_JSON).write_text(card_json(info), encoding="utf-8")


def card_json(info: BundleInfo) -> str:
    """The metadata as JSON."""
    data: dict[str, Any] = card_data(info).to_dict()  # type: ignore[no-untyped-call]
    return json.dumps(data, indent=2) + "\n"


def card(info: BundleInfo) -> str:
    """The card: metadata as YAML, then what people want to know."""
    rows = ["---", card_data(info).to_yaml().strip(), "---", "", f"# {info.name}", ""]
    rows += ["A bundle for `ercbatch label`: an emotion for every utterance.", ""]
    rows += [f"- Base: {info.base}", f"- Quantization: {info.quantization}"]
    rows += [f"- Data: {source}" for source in info.data]
    rows += [f"- Licence: {info.licence}", "", "## Label sets", ""]
    rows += [f"- `{s.name}`: {', '.join(s.labels)}" for s in info.label_sets]
    if info.accepted_loss:
        rows += ["", "## Accepted loss", ""]
        rows += ["It was written although:", ""]
        rows += [f"- {loss}" for loss in info.accepted_loss]
    rows += ["", "## Measured with this bundle", ""]
    if not info.quality:
        rows += ["Nothing: there was no validation data. Confidences are not calibrated.", ""]
    for quality in info.quality:
        rows += [f"### {quality.title}", ""]
        metrics = [[METRICS[k][0], format_metric(k, v)] for k, v in quality.metrics().items()]
        rows += _table(["figure", "value"], metrics)
    rows += [_SCOPE_NOTE, ""]
    for name, offsets in info.label_offsets.items():
        shifts = ", ".join(f"{label} {offset:+.2f}" for label, offset in offsets.items())
        rows += [f"Added to the log probabilities of `{name}`: {shifts}.", ""]
    for name, calibration in info.calibration.items():
        rows += [
            f"## How far to trust a confidence: {name}",
            "",
            *_calibration_section(calibration),
        ]
    return "\n".join(rows).rstrip() + "\n"


def _calibration_section(calibration: Calibration) -> list[str]:
    rows = [
        f"On {calibration.utterances:,} utterances, the calibration error (how far confidences "
        "are from the share of right answers, in the mean over 15 bins) is "
        f"{calibration.error_after}. It is {calibration.error_before} without the temperature of "
        f"{calibration.temperature}; chance alone gives {calibration.error_if_perfect} on as many "
        "utterances, were every confidence true. Each utterance was judged by a "
        "temperature fitted on other dialogues.",
        "",
        "Take the share of right answers that you need, and give `ercbatch label` the confidence "
        "beside it: what is less sure gets no emotion. The fewer answers a row rests on, the less "
        "exactly it will come true.",
        "",
    ]
    head = ["answers right", "`--min-confidence`", "utterances answered", "right here"]
    rows += _table(
        head, [[f"{r.precision:.0%}", *_recommendation_cells(r)] for r in calibration.recommended]
    )
    points = [
        [f"{p.coverage:.0%}", f"{p.risk:.1%}", f"{p.confidence:.2f}"] for p in calibration.coverage
    ]
    return rows + _table(["answering the surest", "errs in", "from a confidence of"], points)


def _recommendation_cells(recommendation: Recommendation) -> list[str]:
    if recommendation.min_confidence is None:
        return ["not reached", "–", "–"]
    right = (
        f"{recommendation.right:,} of {recommendation.answered:,}"
        if recommendation.answered
        else "–"
    )
    return [f"{recommendation.min_confidence:.2f}", f"{recommendation.coverage:.0%}", right]


def _table(head: list[str], body: list[list[Any]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return [*("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]
