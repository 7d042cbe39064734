"""Loss and F1 curves of a run, as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from train.progress import EpochMetrics

CSV, PNG = "curves.csv", "curves.png"


def write_curves(folder: Path, epochs: Sequence[EpochMetrics]) -> None:
    """Write `curves.csv` (one row for each epoch and dataset) and `curves.png`."""
    tasks = list(dict.fromkeys(task for e in epochs for task in e.losses))
    metrics = ("weighted_f1", "macro_f1", "accuracy", "log_loss", "speaker_accuracy")
    with (folder / CSV).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        losses = [f"{task}_loss" for task in tasks]
        writer.writerow(["epoch", "stage", "loss", *losses, "split", "dataset", *metrics])
        for e in epochs:
            epoch_cells = [
                e.epoch,
                e.stage,
                round(e.loss, 5),
                *(_rounded(e.losses.get(t)) for t in tasks),
            ]
            rows = [
                [*epoch_cells, split, name, *(_rounded(values.get(metric)) for metric in metrics)]
                for split, datasets in (("valid", e.valid), ("train", e.train))
                for name, values in datasets.items()
            ]
            writer.writerows(rows or [[*epoch_cells, *[""] * (2 + len(metrics))]])
    _draw(folder / PNG, epochs, tasks)


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 5)


def _draw(path: Path, epochs: Sequence[EpochMetrics], tasks: Sequence[str]) -> None:
    # The object interface: pyplot would choose a backend for the screen, and keep every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for task in tasks:
        points = [(e.epoch, e.losses[task]) for e in epochs if task in e.losses]
        left.plot(*zip(*points, strict=True), marker="o", label=task)
    left.set(xlabel="epoch", ylabel="loss in training (nats)")
    for style, split in (("-", "valid"), (":", "train")):
        for name in dict.fromkeys(n for e in epochs for n in getattr(e, split)):
            series = [(e.epoch, getattr(e, split).get(name, {})) for e in epochs]
            for metric, suffix in (("weighted_f1", ""), ("speaker_accuracy", ", speakers")):
                points = [
                    (epoch, 100 * values[metric]) for epoch, values in series if metric in values
                ]
                if points:
                    label = f"{name}{suffix}{'' if split == 'valid' else ', training data'}"
                    right.plot(*zip(*points, strict=True), style, marker="o", label=label)
    right.set(xlabel="epoch", ylabel="weighted F1; accuracy of speakers (%)")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
