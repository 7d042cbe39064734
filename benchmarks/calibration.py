"""The gain of `export calibrate` with a few labelled dialogues of a new domain.

    python -m benchmarks.calibration [LABELS=]FILE --utterances 200 --draws 10

Each draw takes dialogues until they hold that many labelled utterances, fits the temperature on
them as `export calibrate` does, and measures the calibration error on all other dialogues.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from ercbatch.errors import UsageError
from ercbatch.evaluate import expected_calibration_error
from ercbatch.labeler import Labeler
from ercbatch.scoring import calibrated
from ercbatch.stopping import errors
from export.proof import fit_temperature
from train.datasets import read_dataset
from train.recipe import Source
from train.validate import Predictions, predict


def error(logs: npt.NDArray[np.float64], gold: npt.NDArray[np.int64], temperature: float) -> float:
    """The calibration error of log probabilities [n, labels] at a temperature."""
    likely = calibrated(logs, temperature)
    return expected_calibration_error(likely.max(1), likely.argmax(1) == gold)


def drawn(found: Predictions, utterances: int, seed: int) -> npt.NDArray[np.bool_]:
    """Return the mask [n] of the predictions in a random draw of whole dialogues.

    Raises:
        UsageError: there are not enough dialogues to leave half of them to measure on.
    """
    order = np.random.default_rng(seed).permutation(np.unique(found.dialogue))
    sizes = np.array([(found.dialogue == dialogue).sum() for dialogue in order])
    count = 1 + int(np.searchsorted(sizes.cumsum(), utterances))
    if count > len(order) // 2:
        raise UsageError(f"{utterances} utterances are over half of the dialogues: give more")
    return np.isin(found.dialogue, order[:count])


@click.command()
@click.argument("file")
@click.option("--bundle", default="mini", show_default=True, help="Bundle to measure.")
@click.option("--utterances", default=200, show_default=True, help="Labelled ones in a draw.")
@click.option("--draws", default=10, show_default=True)
def main(file: str, bundle: str, utterances: int, draws: int) -> None:
    """Print the calibration error before and after, for each draw and in the mean."""
    with errors():
        labels, _, path = file.rpartition("=")
        labeler = Labeler(bundle, label_set=labels or None, demonstrations=0)
        shipped = labeler.engine.temperature
        dataset = read_dataset(Source(path, labeler.labels.name), labeler.labels)
        found = predict(replace(labeler.engine, temperature=1.0), dataset)
        logs = np.log(found.probabilities.clip(1e-12))
        rows = []
        for seed in range(draws):
            taken = drawn(found, utterances, seed)
            temperature = fit_temperature(logs[taken], found.gold[taken])
            before = error(logs[~taken], found.gold[~taken], shipped)
            after = error(logs[~taken], found.gold[~taken], temperature)
            rows.append((before, after))
            print(f"draw {seed}: temperature {temperature:.2f}, error {before:.4f} -> {after:.4f}")
        before, after = np.mean(rows, axis=0)
        spread = float(np.std([after for _, after in rows]))
        print(f"mean: {before:.4f} -> {after:.4f} ± {spread:.4f} ({Path(path).stem})")
        summary = {"before": before, "after": after, "spread": spread, "temperature": shipped}
        print(json.dumps({name: round(float(value), 4) for name, value in summary.items()}))


if __name__ == "__main__":
    main()
