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
from ercbatch.packs import Pack, graft
from ercbatch.prompts import template
from ercbatch.records import read_dialogues
from ercbatch.tokens import SegmentTokenizer
from ercbatch.torch_model import Batch, collate
from ercbatch.tree import Question, Renderer, Task, Tree
from train.recipe import Recipe, Source

_LENGTHS = 32
"""Batches are padded to multiples of this many tokens."""

Target = npt.NDArray[np.float32]
"""What an utterance should be answered with: a probability for each label [labels]."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A dialogue and the target of each utterance, where it has one; labels are canonical."""

    dialogue: Dialogue
    targets: tuple[Target | None, ...]

    @property
    def asked(self) -> list[int]:
        """The utterances that have a text and a target."""
        said = enumerate(self.dialogue.utterances)
        return [t for t, u in said if self.targets[t] is not None and u.text.strip()]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Labelled dialogues of one label set."""

    source: Source
    labels: LabelSet
    scenes: tuple[Scene, ...]


def read_dataset(source: Source) -> Dataset:
    """Read a dataset.

    Raises:
        InputError: a bad line, a label outside the set, missing scores, or no label at all.
    """
    labels = label_set(source.labels)
    scenes = [
        _scene(dialogue, labels, source, f"{source.path}, line {line}")
        for number, (line, dialogue) in enumerate(read_dialogues(Path(source.path)))
        if not source.left_out(number)
    ]
    if not any(target is not None for scene in scenes for target in scene.targets):
        raise InputError(
            f"{source.path}: no utterance has a `label`: training needs labelled dialogues"
        )
    return Dataset(source, labels, tuple(scenes))


def _scene(dialogue: Dialogue, labels: LabelSet, source: Source, place: str) -> Scene:
    record = dialogue.record
    turns = record["utterances" if "utterances" in record else "messages"]
    utterances, targets = [], []
    for utterance, turn in zip(dialogue.utterances, turns, strict=True):
        label = None
        if utterance.label is not None and source.soft < 1:
            label = labels.canonical(utterance.label)
            if label is None:
                raise InputError(
                    f"{place}: label {utterance.label!r} is not in the "
                    f"label set {labels.name}: {', '.join(labels.labels)}"
                )
        target = None if label is None else _one_hot(label, labels)
        if source.soft and utterance.text.strip():
            scores = _scores(turn.get("scores"), labels, place)
            target = scores if target is None else source.soft * scores + (1 - source.soft) * target
        utterances.append(replace(utterance, label=label))
        targets.append(target)
    return Scene(Dialogue(tuple(utterances), {}), tuple(targets))


def _one_hot(label: str, labels: LabelSet) -> Target:
    target: Target = np.eye(len(labels), dtype=np.float32)[labels.index(label)]
    return target


def _scores(value: object, labels: LabelSet, place: str) -> Target:
    if not isinstance(value, Mapping) or set(value) != set(labels.labels):
        raise InputError(
            f"{place}: an utterance has no `scores` over the label set {labels.name}: "
            "run `python -m train teach` first"
        )
    return np.array([value[label] for label in labels.labels], dtype=np.float32)


def without_overlap(dataset: Dataset, held_out: Sequence[Dataset], letters: int) -> Dataset:
    """The dataset without the dialogues that share a line of that many letters with `held_out`."""
    known = {line for d in held_out for s in d.scenes for line in _lines(s.dialogue, letters)}
    kept = tuple(s for s in dataset.scenes if known.isdisjoint(_lines(s.dialogue, letters)))
    return replace(dataset, scenes=kept)


def _lines(dialogue: Dialogue, letters: int) -> set[str]:
    lines = {"".join(filter(str.isalpha, u.text.casefold())) for u in dialogue.utterances}
    return {line for line in lines if len(line) >= letters}


@dataclass(frozen=True, slots=True)
class TrainingBank:
    """A dataset's own demonstrations, and the vector of each of its texts."""

    bank: DemonstrationBank
    vectors: Mapping[str, npt.NDArray[np.float32]]


def training_bank(dataset: Dataset, encoder: SentenceEncoder, recipe: Recipe) -> TrainingBank:
    """The bank of a training split, balanced over labels."""
    examples = [
        Demonstration(scene.dialogue.utterances[t].text, _likeliest(scene, t, dataset.labels))
        for scene in dataset.scenes
        for t in scene.asked
    ]
    texts = list(dict.fromkeys(e.text for e in examples))
    vectors = dict(zip(texts, encoder.encode(texts), strict=True))
    kept = balance(examples, recipe.bank_per_label, recipe.seed)
    bank = DemonstrationBank(kept, np.stack([vectors[e.text] for e in kept]))
    return TrainingBank(bank, vectors)


def _likeliest(scene: Scene, t: int, labels: LabelSet) -> str:
    target = scene.targets[t]
    assert target is not None  # only utterances with a target are asked about
    return labels.labels[int(target.argmax())]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: a batch, and what its reads should answer.

    `options` [reads, answer tokens] says which answer tokens a read chooses among, `targets`
    [reads, answer tokens] how probable each should be, `weights` [reads] how much the read counts.
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
        self._tokenizer = _NoisyTokenizer(tokenizer, recipe.token_dropout)
        self._renderers: dict[tuple[int, bool], Renderer] = {}
        for i, dataset in enumerate(datasets):
            for later in (False, True):
                future = recipe.later_window if later else 0
                window = replace(recipe.window, future=future)
                labels = dataset.labels.labels
                self._renderers[i, later] = Renderer(self._tokenizer, wording, window, labels)
        tokens = {t for r in self._renderers.values() for t in r.trie.tokens}
        self.answer_tokens = tuple(sorted(tokens))
        self._column = {token: i for i, token in enumerate(self.answer_tokens)}
        self._class_weights = [_class_weights(d, recipe.class_balance) for d in datasets]

    def epoch(self, number: int) -> Iterator[Step]:
        """The steps of one epoch; the same number gives the same steps."""
        random = np.random.default_rng([self._recipe.seed, number])
        self._tokenizer.draw_from(random)
        drawn: list[tuple[int, Scene]] = []
        for i, dataset in enumerate(self._datasets):
            count = max(1, round(len(dataset.scenes) * dataset.source.fraction))
            for j in random.permutation(len(dataset.scenes))[:count]:
                drawn.append((i, dataset.scenes[j]))
        random.shuffle(drawn)
        trees: list[list[tuple[int, Tree]]] = [[] for _ in self._datasets]
        for owner, (i, scene) in enumerate(drawn):
            later = bool(random.random() < self._recipe.later_turns)
            questions = self._questions(i, scene, random)
            if questions:
                rendered = self._renderers[i, later].trees(scene.dialogue, questions)
                trees[i] += [(owner, tree) for tree in rendered]
        packs = [
            packed
            for i, own in enumerate(trees)
            for packed in _packs(own, len(self._renderers[i, False].head), self._recipe.pack_tokens)
        ]
        # Packs of like length share a step, so that little is padded; steps come in random order.
        size = self._recipe.packs_per_step
        order = sorted(random.permutation(len(packs)), key=lambda p: -len(packs[p]))
        steps = [order[at : at + size] for at in range(0, len(order), size)]
        for at in random.permutation(len(steps)):
            yield self._step([packs[p] for p in steps[at]], drawn)

    def _questions(self, i: int, scene: Scene, random: np.random.Generator) -> list[Question]:
        recipe = self._recipe
        asked = scene.asked
        questions = []
        shown: dict[int, tuple[tuple[str, str], ...]] = {}
        if i in self._banks and random.random() < recipe.demonstrations and asked:
            own = self._banks[i]
            count = int(random.integers(1, recipe.demonstrations_most + 1))
            texts = [scene.dialogue.utterances[t].text for t in asked]
            gold = None
            if recipe.same_label:
                gold = [_likeliest(scene, t, self._datasets[i].labels) for t in asked]
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

    def _step(self, packs: Sequence[Pack], drawn: Sequence[tuple[int, Scene]]) -> Step:
        reads = [(owner, read) for p in packs for _, owner, read in p.reads]
        options = torch.zeros((len(reads), len(self.answer_tokens)), dtype=torch.bool)
        targets = torch.zeros((len(reads), len(self.answer_tokens)))
        weights = torch.zeros(len(reads))
        tasks = torch.zeros(len(reads), dtype=torch.long)
        for row, (owner, read) in enumerate(reads):
            i, scene = drawn[owner]
            target = scene.targets[read.question.utterance]
            assert target is not None  # only utterances with a target are asked about
            choice = self._renderers[i, False].trie.choices[read.choice]
            options[row, [self._column[token] for token in choice.options]] = True
            tasks[row] = read.question.task is Task.IMPACT
            weighted = target * self._class_weights[i]
            for token, behind in zip(choice.options, choice.labels, strict=True):
                targets[row, self._column[token]] = float(weighted[list(behind)].sum())
            # What does not pass this choice of the trie does not count in it.
            weights[row] = targets[row].sum()
            targets[row] /= weights[row].clamp(min=1e-9)
        return Step(collate(packs, _LENGTHS), options, targets, weights, tasks)


class _NoisyTokenizer(SegmentTokenizer):
    """Leaves some tokens of what people say out, others each time; the template's own all stay."""

    def __init__(self, tokenizer: SegmentTokenizer, share: float) -> None:
        self.controls = tokenizer.controls
        self.template = tokenizer.template
        self._whole = tokenizer
        self._share = share

    def draw_from(self, random: np.random.Generator) -> None:
        """Decide with this generator from now on."""
        self._random = random

    def content(self, text: str, limit: int) -> tuple[int, ...]:
        """See `SegmentTokenizer.content`."""
        ids = self._whole.content(text, limit)
        if not self._share:
            return ids
        kept = self._random.random(len(ids)) >= self._share
        return tuple(id_ for id_, keep in zip(ids, kept, strict=True) if keep)


def _packs(trees: Sequence[tuple[int, Tree]], shared: int, length: int) -> Iterator[Pack]:
    """Trees of one dataset on a shared head, at most `length` tokens a pack where they can be."""
    waiting: list[tuple[int, Tree]] = []
    used = shared
    for owner, tree in trees:
        more = len(tree) - shared
        if waiting and used + more > length:
            yield graft(waiting, shared)
            waiting, used = [], shared
        waiting.append((owner, tree))
        used += more
    if waiting:
        yield graft(waiting, shared)


def _class_weights(dataset: Dataset, power: float) -> Target:
    counts = np.ones(len(dataset.labels))
    counts += sum(t for scene in dataset.scenes for t in scene.targets if t is not None)
    weights = (counts / counts.sum()) ** -power
    return np.asarray(weights / (weights * counts).sum() * counts.sum(), dtype=np.float32)
