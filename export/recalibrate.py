"""A bundle measured and calibrated anew, on dialogues of one's own; its model stays as it is."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import Bundle, write_bundle
from ercbatch.bundle.folders import check_output
from ercbatch.bundle.manifest import BundleInfo
from ercbatch.bundle.metrics import Quality
from ercbatch.engine import Engine
from ercbatch.labeler import Labeler
from ercbatch.retrieval.retriever import open_retriever
from ercbatch.scoring.threads import available_threads
from export.proof.calibration import (
    Calibrated,
    Scaling,
    calibrate_sets,
    calibration_error,
    scaled,
)
from export.proof.card import write_card
from export.proof.losses import UNCOMPARED, UNMEASURED
from export.proof.measure import f1_with_demonstrations
from train.datasets import Dataset, dataset_names, read_dataset
from train.sources import Source
from train.validate import Predictions, predict


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """How a bundle is calibrated.

    Attributes:
        fitted: (label set, file) of the dialogues that temperatures are fitted on.
        only_measured: (label set, file) of dialogues that are measured, and fit nothing.
        label_shift: whether each label gets an offset too, for how common it is.
        name: the new bundle's name; None to keep the old one.
        turns: earlier turns in the window; None to keep it.
        stride: by how many turns the window moves; None to keep it.
    """

    fitted: tuple[tuple[str, Path], ...]
    only_measured: tuple[tuple[str, Path], ...] = ()
    label_shift: bool = False
    name: str | None = None
    turns: int | None = None
    stride: int | None = None

    @property
    def measured(self) -> tuple[tuple[str, Path], ...]:
        """All dialogues, those that are fitted on first."""
        return (*self.fitted, *self.only_measured)


def recalibrate(
    bundle: Bundle, folder: Path, options: CalibrateOptions, *, force: bool = False
) -> BundleInfo:
    """Write the bundle with temperatures, metrics and card from labelled dialogues.

    Label sets without dialogues keep what they have. With another window they keep their
    temperatures, but no metrics, which were measured with the old one.

    Raises:
        InputError: the dialogues have no labels, or labels outside the set.
        UsageError: the bundle has no such label set, a window out of range, or `folder` exists.
        OutputError: it cannot be written.
    """
    inputs = [bundle.folder, *(path for _, path in options.measured)]
    check_output(folder, manifest.MANIFEST, force=force, inputs=inputs)
    old = bundle.info.window
    window = replace(
        old,
        turns=old.turns if options.turns is None else options.turns,
        stride=old.stride if options.stride is None else options.stride,
    )
    moved = replace(bundle, info=replace(bundle.info, window=window))
    info = _calibrated(moved, options, keep_metrics=window == old)

    def fill(part: Path) -> BundleInfo:
        for name in bundle.info.files:
            shutil.copyfile(bundle.path(name), part / name)
        write_card(info, part)
        return info

    return write_bundle(folder, fill, force=force)


def _calibrated(bundle: Bundle, options: CalibrateOptions, *, keep_metrics: bool) -> BundleInfo:
    """Fit and measure, and return the new description of the bundle.

    With `keep_metrics`, label sets without dialogues keep their metrics.
    """
    old = bundle.info
    datasets = [
        read_dataset(Source(str(path), labels), old.label_set(labels))
        for labels, path in options.measured
    ]
    engines = {
        labels: replace(
            Labeler(bundle, label_set=labels, demonstrations=0).engine, temperature=1.0, offsets=()
        )
        for labels in dict.fromkeys(d.labels.name for d in datasets)
    }
    predicted = [(d.labels.name, predict(engines[d.labels.name], d)) for d in datasets]
    count = len(options.fitted)
    calibration = calibrate_sets(predicted[:count], label_shift=options.label_shift)
    offsets = {k: v for k, v in old.label_offsets.items() if k not in calibration}
    for labels, calibrated in calibration.items():
        if calibrated.scaling.offsets:
            names = old.label_set(labels).labels
            offsets[labels] = dict(zip(names, calibrated.scaling.offsets, strict=True))
    temperatures = {k: calibrated.scaling.temperature for k, calibrated in calibration.items()}
    info = replace(old, temperatures={**old.temperatures, **temperatures}, label_offsets=offsets)
    quality = _quality(replace(bundle, info=info), engines, datasets, predicted, calibration)
    kept_quality = tuple(q for q in old.quality if keep_metrics and q.label_set not in calibration)
    accepted_loss = tuple(UNCOMPARED if loss == UNMEASURED else loss for loss in old.accepted_loss)
    return replace(
        info,
        name=options.name or old.name,
        accepted_loss=accepted_loss,
        quality=(*kept_quality, *quality),
        calibration={
            **(old.calibration if keep_metrics else {}),
            **{labels: calibrated.metrics for labels, calibrated in calibration.items()},
        },
    )


def _quality(
    bundle: Bundle,
    engines: Mapping[str, Engine],
    datasets: Sequence[Dataset],
    predicted: Sequence[tuple[str, Predictions]],
    calibration: Mapping[str, Calibrated],
) -> list[Quality]:
    """The metrics of each dataset.

    Answers on datasets that were calibrated on are scaled by what was fitted on other dialogues,
    answers on the others by what the bundle has.
    """
    info, retriever = bundle.info, None
    if manifest.ENCODER in info.files:
        retriever = open_retriever(bundle, available_threads())
    calibrated_predictions = {
        labels: deque(calibrated.predictions) for labels, calibrated in calibration.items()
    }
    quality = []
    for name, dataset, (labels, raw) in zip(
        dataset_names(datasets), datasets, predicted, strict=True
    ):
        offsets = info.offsets(dataset.labels)
        scaling = Scaling(info.temperatures.get(labels, 1.0), offsets)
        weight, predictions = 0.0, scaled(raw, scaling)
        if calibrated_predictions.get(labels):  # those that were calibrated on come first
            weight, predictions = (
                1 / len(calibration[labels].predictions),
                calibrated_predictions[labels].popleft(),
            )
        demonstrations_f1 = None
        if retriever is not None:
            engine = replace(engines[labels], temperature=scaling.temperature, offsets=offsets)
            demonstrations_f1 = f1_with_demonstrations(engine, dataset, retriever)
        metrics = {**predictions.metrics(), "log_loss": raw.metrics()["log_loss"]}
        quality.append(
            Quality(
                labels,
                name,
                len(predictions.gold),
                **metrics,
                calibration_error=calibration_error(predictions),
                calibration_weight=weight,
                weighted_f1_with_demonstrations=demonstrations_f1,
            )
        )
    return quality
