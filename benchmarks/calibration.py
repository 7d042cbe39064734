"""The gain of `export calibrate` with a few labelled dialogues of a new domain.

    python -m benchmarks.calibration [LABELS=]FILE --utterances 200 --draws 10

Each draw takes dialogues until they hold that many labelled utterances, fits the temperature on
them as `export calibrate` does, and measures all other dialogues. `--label-shift` is as there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, pstdev

import click
import numpy as np
import numpy.typing as npt

from ercbatch.errors import UsageError
from ercbatch.labeler import Labeler
from ercbatch.terminal.stopping import exit_on_errors
from export.proof.calibration import (
    Scaling,
    calibration_error,
    fit_label_shift,
    fit_temperature,
    scaled,
)
from train.datasets import read_dataset
from train.sources import Source
from train.validate import Predictions, predict


def draw_mask(predictions: Predictions, utterances: int, seed: int) -> npt.NDArray[np.bool_]:
    """Return the mask [n] of the predictions in a random draw of whole dialogues.

    Raises:
        UsageError: there are not enough dialogues to leave half of them to measure on.
    """
    order = np.random.default_rng(seed).permutation(np.unique(predictions.dialogue))
    sizes = np.array([(predictions.dialogue == dialogue).sum() for dialogue in order])
    count = 1 + int(np.searchsorted(sizes.cumsum(), utterances))
    if count > len(order) // 2:
        raise UsageError(f"{utterances} utterances are over half of the dialogues: give more")
    return np.isin(predictions.dialogue, order[:count])


def _summarize(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Metric -> mean and standard deviation over the rows."""
    values = {metric: [row[metric] for row in rows] for metric in rows[0]}
    return {metric: (round(mean(v), 4), round(pstdev(v), 4)) for metric, v in values.items()}


@click.command()
@click.argument("file")
@click.option("--bundle", default="mini", show_default=True, help="Bundle to measure.")
@click.option("--utterances", default=200, show_default=True, help="Labelled ones in a draw.")
@click.option("--draws", default=10, show_default=True)
@click.option("--label-shift", is_flag=True, help="As `export calibrate` has it.")
def main(file: str, bundle: str, utterances: int, draws: int, label_shift: bool) -> None:
    """Print the figures of all other dialogues before and after, in the mean of the draws."""
    with exit_on_errors():
        labels, _, path = file.rpartition("=")
        labeler = Labeler(bundle, label_set=labels or None, demonstrations=0)
        shipped = Scaling(labeler.engine.temperature, labeler.engine.offsets)
        dataset = read_dataset(Source(path, labeler.labels.name), labeler.labels)
        predictions = predict(replace(labeler.engine, temperature=1.0, offsets=()), dataset)
        fit = fit_label_shift if label_shift else fit_temperature
        rows: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        for seed in range(draws):
            mask = draw_mask(predictions, utterances, seed)
            sample, others = predictions.where(mask), predictions.where(~mask)
            fitted = fit(sample.logs, sample.gold)
            for name, scaling in (("before", shipped), ("after", fitted)):
                answers = scaled(others, scaling)
                error = calibration_error(answers)
                rows[name].append({**answers.metrics(), "calibration_error": error})
        summary = {name: _summarize(metric_rows) for name, metric_rows in rows.items()}
        for name, metrics in summary.items():
            print(f"{name}:")
            for metric, (average, deviation) in metrics.items():
                print(f"  {metric.replace('_', ' ')}: {average} ± {deviation}")
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
