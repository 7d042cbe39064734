"""Metrics of a bundle's labels in several domains, beside two baselines.

    python -m benchmarks.domains RECIPE [LABELS=]FILE... --bundle mini

Each FILE holds dialogues of one domain with gold labels. The baselines are the commonest label of
the file, which needs no model, and a sentence classifier: logistic regression on the embeddings of
single utterances (all-MiniLM-L6-v2), fitted on the training data of the same label set that RECIPE
names. `--plain` labels the texts without case and punctuation too, `--no-emoji` without emoji.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import emoji
import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from ercbatch.bundle.bundle import encoder_files
from ercbatch.dialogues import Dialogue
from ercbatch.errors import UsageError
from ercbatch.evaluate import Evaluation, evaluation
from ercbatch.labeler import Labeler
from ercbatch.labels import LabelSet
from ercbatch.retrieval.encoder import SentenceEncoder
from ercbatch.scoring.threads import available_threads
from ercbatch.terminal.stopping import exit_on_errors
from train.datasets import Dataset, read_dataset
from train.recipe import Recipe, read_recipe
from train.sources import Source
from train.validate import predict

Rewrite = Callable[[str], str]
_MAX_UTTERANCES = 60_000
"""Training utterances of the sentence classifier, at most."""


@dataclass(frozen=True, slots=True)
class Row:
    """One system on one file: weighted and macro F1, calibration error, recall of each label."""

    file: str
    labels: str
    system: str
    utterances: int
    weighted_f1: float
    macro_f1: float
    ece: float | None
    recall: dict[str, float]


def row(
    name: str, labels: LabelSet, system: str, result: Evaluation, *, has_confidence: bool = True
) -> Row:
    """The row of an evaluation; without `has_confidence` it has no calibration error."""
    recall = {label: round(f.recall, 4) for label, f in result.per_label.items() if f.support}
    return Row(
        name,
        labels.name,
        system,
        result.utterances,
        round(result.weighted_f1, 4),
        round(result.macro_f1, 4),
        round(result.ece, 4) if has_confidence else None,
        recall,
    )


def evaluate_bundle(
    labeler: Labeler, dataset: Dataset, rewrite: Rewrite | None = None
) -> Evaluation:
    """Evaluate the bundle on a dataset, with its texts rewritten if `rewrite` is given."""
    if rewrite is not None:
        scenes = [replace(s, dialogue=_rewritten(s.dialogue, rewrite)) for s in dataset.scenes]
        dataset = replace(dataset, scenes=tuple(scenes))
    predictions = predict(labeler.engine, dataset)
    best = predictions.probabilities.argmax(1)
    return evaluation(dataset.labels, predictions.gold, best, predictions.probabilities.max(1))


def _rewritten(dialogue: Dialogue, rewrite: Rewrite) -> Dialogue:
    turns = [replace(u, text=rewrite(u.text).strip() or u.text) for u in dialogue.utterances]
    return replace(dialogue, utterances=tuple(turns))


def plain(text: str) -> str:
    """The text without case and punctuation."""
    return " ".join(re.sub(r"[^\w\s'’]|_", " ", text.lower()).split())


def without_emoji(text: str) -> str:
    """The text without emoji."""
    return emoji.replace_emoji(text, "")


def gold_utterances(dataset: Dataset) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Texts and gold label indices of a dataset."""
    pairs = [
        (u.text, dataset.labels.index(u.label))
        for scene in dataset.scenes
        for u in scene.dialogue.utterances
        if u.label is not None and not u.blank
    ]
    return [text for text, _ in pairs], np.array([label for _, label in pairs])


class SentenceClassifier:
    """Logistic regression on the embeddings of single utterances."""

    def __init__(self, encoder: SentenceEncoder, recipe: Recipe, labels: LabelSet) -> None:
        texts: list[str] = []
        targets: list[npt.NDArray[np.int64]] = []
        for source in recipe.train:
            if source.labels != labels.name or source.soft == 1:
                continue
            dataset_texts, gold = gold_utterances(read_dataset(replace(source, soft=0.0)))
            # Each dataset counts as much as it does in training.
            indices = np.random.default_rng(0).permutation(len(dataset_texts))
            indices = indices[: round(len(dataset_texts) * min(1.0, source.fraction))]
            texts += [dataset_texts[i] for i in indices]
            targets.append(gold[indices])
        if not texts:
            raise UsageError(f"the recipe has no training data for the label set {labels.name}")
        y = np.concatenate(targets)
        subset = np.random.default_rng(1).permutation(len(texts))[:_MAX_UTTERANCES]
        self._encoder = encoder
        self._model = LogisticRegression(max_iter=300)
        self._model.fit(encoder.encode([texts[i] for i in subset]), y[subset])

    def evaluate(self, dataset: Dataset) -> Evaluation:
        """Evaluate the classifier on a dataset."""
        texts, gold = gold_utterances(dataset)
        probabilities = self._model.predict_proba(self._encoder.encode(texts))
        best = self._model.classes_[probabilities.argmax(1)]
        return evaluation(dataset.labels, gold, best, probabilities.max(1))


def majority(dataset: Dataset) -> Evaluation:
    """Evaluate a system that always answers with the commonest gold label."""
    _, gold = gold_utterances(dataset)
    best = np.full_like(gold, np.bincount(gold).argmax())
    return evaluation(dataset.labels, gold, best, np.ones(len(gold)))


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("files", nargs=-1, required=True)
@click.option("--bundle", default="mini", show_default=True, help="Bundle to measure.")
@click.option("--plain", "as_plain", is_flag=True, help="Also without case and punctuation.")
@click.option("--no-emoji", is_flag=True, help="Also without emoji.")
@click.option("--baselines/--no-baselines", default=True, show_default=True, help="Fit them.")
def main(
    recipe: Path,
    files: Sequence[str],
    bundle: str,
    as_plain: bool,
    no_emoji: bool,
    baselines: bool,
) -> None:
    """Print a table of systems and domains, then one JSON line."""
    with exit_on_errors():
        rows: list[Row] = []
        resolved = read_recipe(recipe)
        classifiers: dict[str, SentenceClassifier] = {}
        encoder = SentenceEncoder(*encoder_files("mini"), threads=available_threads())
        for file in files:
            labels, _, path = file.rpartition("=")
            labeler = Labeler(bundle, label_set=labels or None, demonstrations=0)
            label_set = labeler.labels
            dataset = read_dataset(Source(path, label_set.name), label_set)
            name = Path(path).stem
            if baselines:
                rows.append(
                    row(name, label_set, "majority", majority(dataset), has_confidence=False)
                )
                if label_set.name not in classifiers:
                    classifiers[label_set.name] = SentenceClassifier(encoder, resolved, label_set)
                result = classifiers[label_set.name].evaluate(dataset)
                rows.append(row(name, label_set, "sentences", result))
            rows.append(row(name, label_set, bundle, evaluate_bundle(labeler, dataset)))
            for enabled, variant, rewrite in (
                (as_plain, "plain", plain),
                (no_emoji, "no emoji", without_emoji),
            ):
                if enabled:
                    result = evaluate_bundle(labeler, dataset, rewrite)
                    rows.append(row(name, label_set, f"{bundle}, {variant}", result))
        for r in rows:
            print(_line(r))
        print(json.dumps([asdict(r) for r in rows]))


def _line(r: Row) -> str:
    recall: Any = " ".join(f"{label} {100 * value:.0f}" for label, value in r.recall.items())
    error = "     " if r.ece is None else f"{r.ece:.3f}"
    return (
        f"{r.file:20}{r.labels:13}{r.system:18}{r.utterances:6,}  weighted F1 "
        f"{100 * r.weighted_f1:5.1f}  macro {100 * r.macro_f1:5.1f}  ECE {error}  recall: {recall}"
    )


if __name__ == "__main__":
    main()
