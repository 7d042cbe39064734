"""Metrics on held-out dialogues, by the very engine that labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ercbatch.engine import Engine
from ercbatch.evaluate import f1_metrics
from ercbatch.prompts.answers import AnswerTrie
from ercbatch.prompts.packs import pack
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.prompts.tree import Renderer, Task, speaker_numbers
from ercbatch.retrieval.retriever import Retriever
from ercbatch.scoring.packed_model import PackedModel
from ercbatch.scoring.torch_scorer import TorchScorer
from train.datasets import Dataset, Scene, dataset_names
from train.recipe import Recipe
from train.samples import speaker_questions


@dataclass(frozen=True, slots=True)
class Predictions:
    """Gold label indices [n], probabilities [n, labels], and each one's dialogue [n]."""

    gold: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    dialogue: npt.NDArray[np.int64]

    @property
    def logs(self) -> npt.NDArray[np.float64]:
        """Natural logarithms of the probabilities [n, labels], at least -27.6."""
        return np.asarray(np.log(self.probabilities.clip(1e-12)))

    def where(self, mask: npt.NDArray[np.bool_]) -> Predictions:
        """Those that a mask [n] holds."""
        return Predictions(self.gold[mask], self.probabilities[mask], self.dialogue[mask])

    def metrics(self) -> dict[str, float]:
        """Weighted F1, macro F1, accuracy, and the log loss (mean -log P(gold), in nats)."""
        label_count = self.probabilities.shape[1]
        weighted, macro, accuracy = f1_metrics(self.gold, self.probabilities.argmax(1), label_count)
        log_loss = -float(self.logs[np.arange(len(self.gold)), self.gold].mean())
        return {
            "weighted_f1": weighted,
            "macro_f1": macro,
            "accuracy": accuracy,
            "log_loss": log_loss,
        }


def speaker_accuracy(
    model: PackedModel, renderer: Renderer, dataset: Dataset, pack_tokens: int
) -> float | None:
    """How often the model tells who speaks; None where no dialogue has two speakers."""
    by_trie: dict[AnswerTrie, list[Scene]] = {}
    for scene in dataset.scenes:
        questions = speaker_questions(scene)
        if questions:
            trie = renderer.trie_for(questions[0], scene.dialogue)
            by_trie.setdefault(trie, []).append(scene)
    correct = []
    for trie, scenes in by_trie.items():
        scorer = TorchScorer(model, trie.tokens)
        trees = (
            (i, tree)
            for i, scene in enumerate(scenes)
            for tree in renderer.trees(scene.dialogue, speaker_questions(scene))
        )
        for packed in pack(trees, pack_tokens, len(renderer.speaker_head)):
            for i, utterance, logs in scorer.answers(packed, trie):
                correct.append(speaker_numbers(scenes[i].dialogue)[utterance] == logs.argmax())
    return float(np.mean(correct)) if correct else None


def predict(engine: Engine, dataset: Dataset) -> Predictions:
    """What an engine says of every utterance that has a gold label."""
    gold, rows, owners = [], [], []
    dialogues = (scene.dialogue for scene in dataset.scenes)
    for entry in engine.run(enumerate(dialogues)):
        assert entry.dialogue is not None  # every item is a dialogue
        for t, row in entry.rows.items():
            label = entry.dialogue.utterances[t].label
            if label is not None:
                gold.append(dataset.labels.index(label))
                rows.append(row)
                owners.append(entry.origin)
    return Predictions(np.array(gold), np.array(rows), np.array(owners))


class Validation:
    """Held-out datasets and the engine of each.

    `retrievers` maps label sets' names to what finds the `demonstrations_shown` of the recipe.
    """

    def __init__(
        self,
        model: PackedModel,
        tokenizer: SegmentTokenizer,
        recipe: Recipe,
        datasets: Sequence[Dataset],
        retrievers: Mapping[str, Retriever] | None = None,
    ) -> None:
        wording = recipe.wording
        self._model = model
        self._pack_tokens = recipe.pack_tokens
        self._demonstrations = recipe.demonstrations_shown
        self._retrievers = retrievers or {}
        self._datasets = [
            (name, d, Renderer(tokenizer, wording, recipe.window, d.labels.labels))
            for name, d in zip(dataset_titles(datasets), datasets, strict=True)
        ]

    def metrics(self, tasks: Collection[Task]) -> dict[str, dict[str, float]]:
        """Metrics by dataset, with the model as it is now.

        For emotions they are those of `Predictions`, for speakers `speaker_accuracy`.
        """
        self._model.eval()
        metrics: dict[str, dict[str, float]] = {}
        for name, dataset, renderer in self._datasets:
            if Task.EMOTION in tasks and dataset.labelled:
                scorer = TorchScorer(self._model, renderer.trie.tokens)
                retriever = self._retrievers.get(dataset.labels.name)
                engine = Engine(
                    scorer, renderer, 1.0, self._pack_tokens, retriever, self._demonstrations
                )
                metrics[name] = predict(engine, dataset).metrics()
            if Task.SPEAKER in tasks:
                accuracy = speaker_accuracy(self._model, renderer, dataset, self._pack_tokens)
                if accuracy is not None:
                    metrics.setdefault(name, {})["speaker_accuracy"] = accuracy
        return metrics


def dataset_titles(datasets: Sequence[Dataset]) -> list[str]:
    """The label set of each; with the file's name where several have it."""
    sets = [d.labels.name for d in datasets]
    return [
        name if sets.count(name) == 1 else f"{name} ({file})"
        for name, file in zip(sets, dataset_names(datasets), strict=True)
    ]
