"""A bundle measured and calibrated anew, on dialogues of one's own; its model stays as it is."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ercbatch.bundle import manifest as files
from ercbatch.bundle.bundle import Bundle, write_bundle
from ercbatch.bundle.folders import check_output
from ercbatch.bundle.manifest import BundleInfo
from ercbatch.bundle.metrics import Quality
from ercbatch.engine import Engine
from ercbatch.labeler import Labeler
from ercbatch.retrieval.retriever import open_retriever
from ercbatch.scoring.onnx_scorer import available_threads
from export.proof.calibration import (
    Calibrated,
    Scaling,
    calibrate_sets,
    calibration_error,
    scaled,
)
from export.proof.card import write_card
from export.proof.losses import UNCOMPARED, UNMEASURED
from export.proof.measure import with_demonstrations
from train.datasets import Dataset, file_names, read_dataset
from train.recipe import Source
from train.validate import Predictions, predict


def recalibrate(
    bundle: Bundle,
    given: Sequence[tuple[str, Path]],
    folder: Path,
    *,
    only_measured: Sequence[tuple[str, Path]] = (),
    label_shift: bool = False,
    name: str | None = None,
    turns: int | None = None,
    stride: int | None = None,
    force: bool = False,
) -> BundleInfo:
    """Write the bundle with temperatures, figures and card from labelled dialogues.

    `given` are names of its label sets, and files of dialogues that have these labels. The files
    `only_measured` are not used to fit anything. With `label_shift` each label gets an offset too,
    for how common it is in the dialogues. The other label sets keep what they have. By default
    the bundle keeps its `name`, and its window of so many earlier `turns` that moves by
    `stride`. With another window the other label sets keep their temperatures, but no figures,
    since those were measured with the old one.

    Raises:
        InputError: the dialogues have no labels, or labels outside the set.
        UsageError: the bundle has no such label set, a window out of range, or `folder` exists.
        OutputError: it cannot be written.
    """
    read = [bundle.folder, *(path for _, path in (*given, *only_measured))]
    check_output(folder, files.MANIFEST, force=force, inputs=read)
    old = bundle.info.window
    window = replace(
        old,
        turns=old.turns if turns is None else turns,
        stride=old.stride if stride is None else stride,
    )
    bundle = replace(bundle, info=replace(bundle.info, window=window))
    label_set = bundle.info.label_set
    datasets = [
        read_dataset(Source(str(path), labels), label_set(labels))
        for labels, path in (*given, *only_measured)
    ]
    engines = {
        labels: replace(
            Labeler(bundle, label_set=labels, demonstrations=0).engine, temperature=1.0, offsets=()
        )
        for labels in dict.fromkeys(d.labels.name for d in datasets)
    }
    said = [(d.labels.name, predict(engines[d.labels.name], d)) for d in datasets]
    calibration = calibrate_sets(said[: len(given)], label_shift=label_shift)
    info = replace(
        bundle.info,
        temperatures={
            **bundle.info.temperatures,
            **{labels: fitted.scaling.temperature for labels, fitted in calibration.items()},
        },
        label_offsets={
            labels: by_label
            for labels, by_label in bundle.info.label_offsets.items()
            if labels not in calibration
        }
        | {
            labels: dict(zip(label_set(labels).labels, found.scaling.offsets, strict=True))
            for labels, found in calibration.items()
            if found.scaling.offsets
        },
    )
    quality = _quality(replace(bundle, info=info), engines, datasets, said, calibration)
    same = window == old
    kept = tuple(q for q in bundle.info.quality if same and q.label_set not in calibration)
    lost = tuple(UNCOMPARED if loss == UNMEASURED else loss for loss in bundle.info.accepted_loss)
    info = replace(
        info,
        name=name or info.name,
        accepted_loss=lost,
        quality=(*kept, *quality),
        calibration={
            **(bundle.info.calibration if same else {}),
            **{labels: fitted.metrics for labels, fitted in calibration.items()},
        },
    )

    def fill(part: Path) -> BundleInfo:
        for name in bundle.info.files:
            shutil.copyfile(bundle.path(name), part / name)
        write_card(info, part)
        return info

    return write_bundle(folder, fill, force=force)


def _quality(
    bundle: Bundle,
    engines: Mapping[str, Engine],
    datasets: Sequence[Dataset],
    said: Sequence[tuple[str, Predictions]],
    calibration: Mapping[str, Calibrated],
) -> list[Quality]:
    """The metrics of each dataset.

    Answers on datasets that were calibrated on are scaled by what was fitted on other dialogues,
    answers on the others by what the bundle has.
    """
    info, retriever = bundle.info, None
    if files.ENCODER in info.files:
        retriever = open_retriever(bundle, available_threads())
    fitted = {labels: deque(found.predictions) for labels, found in calibration.items()}
    quality = []
    for name, dataset, (labels, raw) in zip(file_names(datasets), datasets, said, strict=True):
        offsets = info.offsets(dataset.labels)
        scaling = Scaling(info.temperatures.get(labels, 1.0), offsets)
        weight, found = 0.0, scaled(raw, scaling)
        if fitted.get(labels):  # those that were calibrated on come first
            weight, found = 1 / len(calibration[labels].predictions), fitted[labels].popleft()
        shown = None
        if retriever is not None:
            engine = replace(engines[labels], temperature=scaling.temperature, offsets=offsets)
            shown = with_demonstrations(engine, dataset, retriever)
        metrics = {**found.figures(), "log_loss": raw.figures()["log_loss"]}
        quality.append(
            Quality(
                labels,
                name,
                len(found.gold),
                **metrics,
                calibration_error=calibration_error(found),
                calibration_weight=weight,
                weighted_f1_with_demonstrations=shown,
            )
        )
    return quality
