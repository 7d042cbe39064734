"""The model card of a bundle: what was measured, in the form of Hugging Face's model cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ercbatch import bundle as files
from ercbatch.bundle import BundleInfo

_METRICS = {"weighted_f1": "f1", "macro_f1": "f1", "accuracy": "accuracy"}


def card_data(info: BundleInfo) -> ModelCardData:
    """The metadata of a card: licence, base, and the figures as a model index."""
    results = [
        EvalResult(
            task_type="text-classification",
            task_name="Emotion recognition in conversation",
            dataset_type="dialogues",
            dataset_name=dataset,
            dataset_config=dataset,  # what tells datasets apart in a model index
            metric_type=metric,
            metric_name=name.replace("_", " "),
            metric_value=figures[name],
        )
        for dataset, figures in info.quality.items()
        for name, metric in _METRICS.items()
        if name in figures
    ]
    known = info.licence.partition(" (")[0]  # what comes after it explains
    return ModelCardData(
        model_name=info.name,
        license="other" if " " in known else known.lower(),
        license_name=known if " " in known else None,
        base_model=info.base,
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
    (folder / files.CARD).write_text(card(info), encoding="utf-8")
    (folder / files.CARD_JSON).write_text(card_json(info), encoding="utf-8")


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
        rows += ["By these measures it falls short of the model that it was made from:", ""]
        rows += [f"- {loss}" for loss in info.accepted_loss]
    rows += ["", "## Measured with this bundle", ""]
    if not info.quality:
        rows += ["Nothing: there was no validation data. Confidences are not calibrated.", ""]
    for name, figures in info.quality.items():
        rows += [f"### {name}", ""]
        rows += _table(["figure", "value"], [[k.replace("_", " "), v] for k, v in figures.items()])
    for name, found in info.calibration.items():
        rows += [f"## How far to trust a confidence: {name}", "", *_calibration(found)]
    return "\n".join(rows).rstrip() + "\n"


def _calibration(found: dict[str, Any]) -> list[str]:
    rows = [
        f"On {found['utterances']:,} utterances, each calibrated by dialogues other than its own. "
        f"The calibration error is {found['error_after']} ({found['error_before']} without "
        f"temperature scaling; {found['error_if_perfect']} is what true probabilities would show "
        "on as many utterances).",
        "",
    ]
    recommended = [
        [f"{r['precision']:.0%}", *_answer(r["min_confidence"], r["coverage"])]
        for r in found["recommended"]
    ]
    rows += _table(["right answers", "`--min-confidence`", "utterances answered"], recommended)
    points = [
        [f"{p['coverage']:.0%}", f"{p['risk']:.1%}", f"{p['confidence']:.2f}"]
        for p in found["coverage"]
    ]
    return rows + _table(["answering the surest", "errs in", "from a confidence of"], points)


def _answer(confidence: float | None, coverage: float | None) -> list[str]:
    if confidence is None or coverage is None:
        return ["not reached", "–"]
    return [f"{confidence:.2f}", f"{coverage:.0%}"]


def _table(head: list[str], body: list[list[Any]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return [*("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]
