"""Labelled dialogues to training packs: which questions, which demonstrations, which answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ercbatch.bank import Demonstration, DemonstrationBank, balance
from ercbatch.dialogues import Dialogue
from ercbatch.encoder import SentenceEncoder
from ercbatch.errors import InputError
from ercbatch.labels import LabelSet, label_set
from ercbatch.prompts import template
from ercbatch.records import read_dialogues
from ercbatch.tokens import SegmentTokenizer
from ercbatch.torch_model import Batch, collate
from ercbatch.tree import Pack, Question, Renderer, Task, Tree, pack
from train.recipe import Recipe, Source


@dataclass(frozen=True, slots=True)
class Dataset:
    """Labelled dialogues of one label set; labels are canonical, or None."""

    source: Source
    labels: LabelSet
    dialogues: tuple[Dialogue, ...]


def read_dataset(source: Source) -> Dataset:
    """Read a dataset.

    Raises:
        InputError: a bad line, a label outside the set, or no label at all.
    """
    labels = label_set(source.labels)
    dialogues = []
    seen = 0
    for line, dialogue in read_dialogues(Path(source.path)):
        utterances = []
        for utterance in dialogue.utterances:
            label = utterance.label
            if label is not None:
                label = labels.canonical(label)
                if label is None:
                    raise InputError(
                        f"{source.path}, line {line}: label {utterance.label!r} is not in the "
                        f"label set {labels.name}: {', '.join(labels.labels)}"
                    )
                seen += 1
            utterances.append(replace(utterance, label=label))
        dialogues.append(Dialogue(tuple(utterances), {}))
    if not seen:
        raise InputError(
            f"{source.path}: no utterance has a `label`: training needs labelled dialogues"
        )
    return Dataset(source, labels, tuple(dialogues))


@dataclass(frozen=True, slots=True)
class TrainingBank:
    """A dataset's own demonstrations, and the vector of each of its texts."""

    bank: DemonstrationBank
    vectors: Mapping[str, npt.NDArray[np.float32]]


def training_bank(dataset: Dataset, encoder: SentenceEncoder, recipe: Recipe) -> TrainingBank:
    """The bank of a training split, balanced over labels."""
    examples = [
        Demonstration(u.text, u.label)
        for d in dataset.dialogues
        for u in d.utterances
        if u.label is not None and u.text.strip()
    ]
    texts = list(dict.fromkeys(e.text for e in examples))
    vectors = dict(zip(texts, encoder.encode(texts), strict=True))
    kept = balance(examples, recipe.bank_per_label, recipe.seed)
    bank = DemonstrationBank(kept, np.stack([vectors[e.text] for e in kept]))
    return TrainingBank(bank, vectors)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: a batch, and what its reads should answer.

    `options` [reads, answer tokens] says which answer tokens a read chooses among, `targets`
    [reads] which of them is right, `weights` [reads] how much the read counts.
    """

    batch: Batch
    options: Tensor
    targets: Tensor
    weights: Tensor
    tasks: Tensor


class Sampler:
    """Draws the steps of each epoch, seeded."""

    def __init__(
        self,
        recipe: Recipe,
        datasets: Sequence[Dataset],
        tokenizer: SegmentTokenizer,
        banks: Mapping[int, TrainingBank],
    ) -> None:
        self._recipe = recipe
        self._datasets = datasets
        self._banks = banks
        wording = template(recipe.template)
        self._renderers: dict[tuple[int, bool], Renderer] = {}
        for i, dataset in enumerate(datasets):
            for later in (False, True):
                future = recipe.later_window if later else 0
                window = replace(recipe.window, future=future)
                labels = dataset.labels.labels
                self._renderers[i, later] = Renderer(tokenizer, wording, window, labels)
        tokens = {t for r in self._renderers.values() for t in r.trie.tokens}
        self.answer_tokens = tuple(sorted(tokens))
        self._column = {token: i for i, token in enumerate(self.answer_tokens)}
        self._class_weights = [_class_weights(d, recipe.class_balance) for d in datasets]

    def epoch(self, number: int) -> Iterator[Step]:
        """The steps of one epoch; the same number gives the same steps."""
        random = np.random.default_rng([self._recipe.seed, number])
        drawn: list[tuple[int, Dialogue]] = []
        for i, dataset in enumerate(self._datasets):
            count = max(1, round(len(dataset.dialogues) * dataset.source.fraction))
            for j in random.permutation(len(dataset.dialogues))[:count]:
                drawn.append((i, dataset.dialogues[j]))
        random.shuffle(drawn)
        trees: list[tuple[int, Tree]] = []
        for owner, (i, dialogue) in enumerate(drawn):
            later = bool(random.random() < self._recipe.later_turns)
            questions = self._questions(i, dialogue, random)
            if questions:
                trees += [(owner, t) for t in self._renderers[i, later].trees(dialogue, questions)]
        packs = list(pack(trees, self._recipe.pack_tokens))
        # Packs of like length share a step, so that little is padded; steps come in random order.
        size = self._recipe.packs_per_step
        order = sorted(random.permutation(len(packs)), key=lambda p: -len(packs[p]))
        steps = [order[at : at + size] for at in range(0, len(order), size)]
        for at in random.permutation(len(steps)):
            yield self._step([packs[p] for p in steps[at]], drawn)

    def _questions(self, i: int, dialogue: Dialogue, random: np.random.Generator) -> list[Question]:
        recipe = self._recipe
        asked = [t for t, u in enumerate(dialogue.utterances) if u.label and u.text.strip()]
        questions = []
        shown: dict[int, tuple[tuple[str, str], ...]] = {}
        if i in self._banks and random.random() < recipe.demonstrations and asked:
            own = self._banks[i]
            count = int(random.integers(1, recipe.demonstrations_most + 1))
            texts = [dialogue.utterances[t].text for t in asked]
            gold = [dialogue.utterances[t].label for t in asked] if recipe.same_label else None
            found = own.bank.nearest(
                np.stack([own.vectors[text] for text in texts]), count, labels=gold, exclude=texts
            )
            shown = {
                t: tuple((d.text, d.label) for d in demonstrations)
                for t, demonstrations in zip(asked, found, strict=True)
            }
        for t in asked:
            if "emotion" in recipe.tasks:
                questions.append(Question(Task.EMOTION, t, shown.get(t, ())))
            if "impact" in recipe.tasks and t > 0:
                questions.append(Question(Task.IMPACT, t))
        return questions

    def _step(self, packs: Sequence[Pack], drawn: Sequence[tuple[int, Dialogue]]) -> Step:
        reads = [(owner, read) for p in packs for _, owner, read in p.reads]
        options = torch.zeros((len(reads), len(self.answer_tokens)), dtype=torch.bool)
        targets = torch.zeros(len(reads), dtype=torch.long)
        weights = torch.zeros(len(reads))
        tasks = torch.zeros(len(reads), dtype=torch.long)
        for row, (owner, read) in enumerate(reads):
            i, dialogue = drawn[owner]
            label = dialogue.utterances[read.question.utterance].label
            assert label is not None  # only labelled utterances are asked about
            gold = self._datasets[i].labels.index(label)
            choice = self._renderers[i, False].trie.choices[read.choice]
            options[row, [self._column[token] for token in choice.options]] = True
            tasks[row] = read.question.task is Task.IMPACT
            for token, behind in zip(choice.options, choice.labels, strict=True):
                if gold in behind:
                    targets[row] = self._column[token]
                    weights[row] = self._class_weights[i][gold]
            if weights[row] == 0:  # the gold label does not pass this choice
                targets[row] = self._column[choice.options[0]]
        return Step(collate(packs), options, targets, weights, tasks)


def _class_weights(dataset: Dataset, power: float) -> list[float]:
    counts = np.ones(len(dataset.labels))
    for dialogue in dataset.dialogues:
        for utterance in dialogue.utterances:
            if utterance.label is not None:
                counts[dataset.labels.index(utterance.label)] += 1
    weights = (counts / counts.sum()) ** -power
    return list(weights / (weights * counts).sum() * counts.sum())
