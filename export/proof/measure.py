"""What a run was taught to answer, and what scorers say of the data that it was validated on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ercbatch.digests import file_sha256
from ercbatch.engine import Engine
from ercbatch.errors import LossError, UsageError
from ercbatch.labels import LabelSet
from ercbatch.prompts.packs import Pack, join
from ercbatch.prompts.tree import Question, Renderer, Task
from ercbatch.retrieval.retriever import Retriever
from ercbatch.scoring.scorer import Scorer
from train.datasets import Dataset, dataset_names, read_dataset
from train.recipe import Recipe
from train.run import LoadedRun
from train.validate import Predictions, predict

_WARM_UP_DIALOGUES = 4
"""Dialogues that are answered before the clock runs: what is done once is not the model's speed."""
_DEMONSTRATIONS = 3
"""Demonstrations a question shows where their effect is measured: what `bank build` gives it."""

Say = Callable[[str], None]
"""Hears, in a few words, what is done next."""


class ProofData:
    """What a run was taught to answer, and the data to hold a bundle of it against."""

    def __init__(self, run: LoadedRun) -> None:
        recipe = run.recipe
        self.recipe: Recipe = recipe
        self.wording = recipe.wording
        taught_sources = [
            s for s in recipe.train if read_dataset(s, need_targets=False).has_targets
        ]
        if not taught_sources:
            raise UsageError("the run has learnt no labels: there is nothing to label with")
        sets = {source.labels: source.label_set() for source in taught_sources}
        self.label_sets: tuple[LabelSet, ...] = tuple(sets.values())
        self.sample_source = taught_sources[0]
        self.renderers = {
            s.name: Renderer(run.tokenizer, self.wording, recipe.window, s.labels)
            for s in self.label_sets
        }
        self.tokens = sorted({t for r in self.renderers.values() for t in r.trie.tokens})
        for source in recipe.valid:
            expected = run.data.get(source.path)
            if expected is not None and file_sha256(source.path) != expected:
                raise UsageError(
                    f"{source.path}: not what the run was validated on (its SHA-256 is another): "
                    "put that back; `export calibrate` measures a bundle on other dialogues"
                )
        held_out = [read_dataset(source) for source in recipe.valid]
        for dataset in held_out:
            if dataset.labels.name not in self.renderers:
                raise UsageError(
                    f"{dataset.source.path}: the run has not learnt the labels of "
                    f"{dataset.labels.name}: a bundle is measured on labels that it has"
                )
        self.held_out = tuple(zip(dataset_names(held_out), held_out, strict=True))
        """(name, dataset) of the validation data."""

    def engine(self, scorer: Scorer, dataset: Dataset) -> Engine:
        """What answers a dataset's questions, uncalibrated."""
        renderer = self.renderers[dataset.labels.name]
        return Engine(scorer, renderer, 1.0, self.recipe.pack_tokens)

    def samples(self, count: int) -> list[Pack]:
        """Packs of a few training dialogues."""
        renderer = self.renderers[self.label_sets[0].name]
        return [
            join([(0, tree)])
            for scene in read_dataset(self.sample_source).scenes[:count]
            for tree in renderer.trees(
                scene.dialogue,
                [Question(Task.EMOTION, t) for t in scene.dialogue.nonblank],
            )
        ]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Predictions of a scorer on one dataset, and the seconds that they took."""

    label_set: str
    dataset: str
    predictions: Predictions
    seconds: float


def measure(proof_data: ProofData, scorer: Scorer, say: Say) -> list[Measurement]:
    """Predict all validation data.

    Raises:
        LossError: an answer is not a number.
    """
    measured = []
    for name, dataset in proof_data.held_out:
        say(f"answering {name}: {len(dataset.scenes):,} dialogues")
        predict(
            proof_data.engine(scorer, dataset),
            replace(dataset, scenes=dataset.scenes[:_WARM_UP_DIALOGUES]),
        )
        began = time.perf_counter()
        predictions = predict(proof_data.engine(scorer, dataset), dataset)
        seconds = time.perf_counter() - began
        if not np.isfinite(predictions.probabilities).all():
            raise LossError(
                f"{name}: the answers of {scorer.describe()} are no numbers: its weights are too "
                "large for this form, or broken: choose another --quantize, or train again"
            )
        measured.append(Measurement(dataset.labels.name, name, predictions, seconds))
    return measured


def f1_with_demonstrations(engine: Engine, dataset: Dataset, retriever: Retriever) -> float:
    """Weighted F1 of an engine whose questions show demonstrations."""
    demonstrating = replace(
        engine, retriever=retriever.restricted(dataset.labels), demonstrations=_DEMONSTRATIONS
    )
    return predict(demonstrating, dataset).metrics()["weighted_f1"]
