"""A bundle measured and calibrated anew, on dialogues of one's own; its model stays as it is."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ercbatch import bundle as files
from ercbatch.bundle import Bundle, BundleInfo, write_bundle
from ercbatch.folders import check_output
from ercbatch.labeler import Labeler, open_retriever
from ercbatch.onnx_scorer import available_threads
from export.card import write_card
from export.measure import measured_names, with_demonstrations
from export.proof import (
    UNCOMPARED,
    UNMEASURED,
    calibrate_sets,
    calibration_error,
    rounded,
    temperatures,
)
from train.datasets import read_dataset
from train.recipe import Source
from train.validate import Predictions, predict


def recalibrate(
    bundle: Bundle,
    given: Sequence[tuple[str, Path]],
    folder: Path,
    *,
    only_measured: Sequence[tuple[str, Path]] = (),
    name: str | None = None,
    turns: int | None = None,
    stride: int | None = None,
    force: bool = False,
) -> BundleInfo:
    """Write the bundle with temperatures, figures and card from labelled dialogues.

    `given` are names of its label sets, and files of dialogues that have these labels. Dialogues
    `only_measured` have no part in the temperatures. The other label sets keep what they have. By
    default the bundle keeps its `name`, and its window of so many earlier `turns` that moves by
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
    datasets = [
        read_dataset(Source(str(path), labels), bundle.info.label_set(labels))
        for labels, path in (*given, *only_measured)
    ]
    titles = measured_names(datasets)
    quality: dict[str, Any] = {}
    said: list[tuple[str, Predictions]] = []
    for title, dataset in zip(titles, datasets, strict=True):
        labeler = Labeler(bundle, label_set=dataset.labels.name, demonstrations=0)
        engine = replace(labeler.engine, temperature=1.0)
        found = predict(engine, dataset)
        said.append((dataset.labels.name, found))
        figures = {"utterances": len(found.gold), **found.figures()}
        if files.ENCODER in bundle.info.files:
            retriever = open_retriever(bundle, available_threads())
            figures |= with_demonstrations(engine, dataset, retriever)
        quality[title] = rounded(figures)
    calibration = calibrate_sets(said[: len(given)])
    fitted = {**bundle.info.temperatures, **temperatures(calibration)}
    parts = Counter(labels for labels, _ in given)
    for number, (title, (labels, found)) in enumerate(zip(titles, said, strict=True)):
        quality[title]["calibration_error"] = calibration_error(found, fitted.get(labels, 1.0))
        weight = 1 / parts[labels] if number < len(given) else 0.0
        quality[title]["calibration_weight"] = round(weight, 4)
    # A figure's name begins with its label set.
    anew = tuple(f"{labels}{mark}" for labels in calibration for mark in (", ", " ("))
    same = window == old
    kept = {t: f for t, f in bundle.info.quality.items() if same and not t.startswith(anew)}
    lost = tuple(UNCOMPARED if loss == UNMEASURED else loss for loss in bundle.info.accepted_loss)
    info = replace(
        bundle.info,
        name=name or bundle.info.name,
        accepted_loss=lost,
        quality={**kept, **quality},
        calibration={**(bundle.info.calibration if same else {}), **calibration},
        temperatures=fitted,
    )

    def fill(part: Path) -> BundleInfo:
        for name in bundle.info.files:
            shutil.copyfile(bundle.path(name), part / name)
        write_card(info, part)
        return info

    return write_bundle(folder, fill, force=force)
