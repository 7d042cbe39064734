"""Labelled dialogues to training packs: which questions, which demonstrations, which answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ercbatch.dialogues import Dialogue
from ercbatch.labels import LabelSet
from ercbatch.prompts.packs import Pack, pack
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.prompts.tree import Question, Renderer, Task, Tree, speaker_numbers
from ercbatch.retrieval.bank import Demonstration, DemonstrationBank, balance
from ercbatch.retrieval.encoder import SentenceEncoder
from ercbatch.scoring.packed_model import Batch, collate
from train.datasets import Dataset, Scene, Target, one_hot
from train.noise import hurried, rewritten, transcribed
from train.recipe import Recipe

_PAD_MULTIPLE = 32
"""Batches are padded to multiples of this many tokens."""
TASKS = tuple(Task)
"""`Step.tasks` are indices into this."""


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
        for t in scene.target_utterances
    ]
    texts = list(dict.fromkeys(e.text for e in examples))
    vectors = dict(zip(texts, encoder.encode(texts), strict=True))
    balanced = balance(examples, recipe.bank_per_label, recipe.seed)
    bank = DemonstrationBank(balanced, np.stack([vectors[e.text] for e in balanced]))
    return TrainingBank(bank, vectors)


def joined(
    banks: Sequence[DemonstrationBank], leave_out: Collection[str] = ()
) -> DemonstrationBank:
    """One bank of what these hold, but for some texts."""
    demonstrations = [d for bank in banks for d in bank.demonstrations]
    indices = [i for i, d in enumerate(demonstrations) if d.text not in leave_out]
    vectors = np.concatenate([bank.vectors for bank in banks])
    return DemonstrationBank([demonstrations[i] for i in indices], vectors[indices])


def _likeliest(scene: Scene, t: int, labels: LabelSet) -> str:
    target = scene.targets[t]
    assert target is not None  # only utterances with a target are asked about
    return labels.labels[int(target.argmax())]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: a batch, and what its reads should answer.

    `options` [reads, answer tokens] says which answer tokens a read chooses among, `targets`
    [reads, answer tokens] how probable each should be, `weights` [reads] how much the read counts,
    `tasks` [reads] what it is about (an index into `TASKS`).
    """

    batch: Batch
    options: Tensor
    targets: Tensor
    weights: Tensor
    tasks: Tensor

    def to(self, device: torch.device) -> Step:
        """The same on a device."""
        batch = Batch(*(tensor.to(device) for tensor in self.batch))
        tensors = (self.options, self.targets, self.weights, self.tasks)
        return Step(batch, *(tensor.to(device) for tensor in tensors))


class Epoch:
    """The steps of one epoch, each put together when it is taken."""

    def __init__(self, steps: Sequence[Sequence[Pack]], step: Callable[..., Step]) -> None:
        self._packs = steps
        self._step = step

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, number: int) -> Step:
        return self._step(self._packs[number])

    def __iter__(self) -> Iterator[Step]:
        return map(self._step, self._packs)

    @property
    def longest(self) -> int:
        """The number of the step that takes the most memory."""
        lengths = [max(len(p) for p in packs) for packs in self._packs]
        return lengths.index(max(lengths))


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
        self._tokenizer = _NoisyTokenizer(tokenizer, recipe.token_dropout)
        self._renderers: dict[tuple[int, bool], Renderer] = {}
        for i, dataset in enumerate(datasets):
            for later in (False, True):
                future = recipe.later_window if later else 0
                window = replace(recipe.window, future=future)
                labels = dataset.labels.labels
                self._renderers[i, later] = Renderer(
                    self._tokenizer, recipe.wording, window, labels
                )
        tries = [renderer.trie for renderer in self._renderers.values()]
        if Task.SPEAKER.value in recipe.tasks:
            tries += [
                self._renderers[i, False].trie_for(question, scene.dialogue)
                for i, dataset in enumerate(datasets)
                for scene in dataset.scenes
                for question in speaker_questions(scene)[:1]
            ]
        self.answer_tokens = tuple(sorted({token for trie in tries for token in trie.tokens}))
        self._column = {token: i for i, token in enumerate(self.answer_tokens)}
        self._class_weights = [_class_weights(d, recipe.class_balance) for d in datasets]

    def epoch(self, number: int, tasks: Collection[Task]) -> Epoch:
        """One epoch of these tasks; the same arguments give the same steps."""
        random = np.random.default_rng([self._recipe.seed, number])
        self._tokenizer.draw_from(random)
        drawn_scenes: list[tuple[int, Scene]] = []
        for i, dataset in enumerate(self._datasets):
            count = max(1, round(len(dataset.scenes) * dataset.source.fraction))
            for j in random.permutation(len(dataset.scenes))[:count]:
                drawn_scenes.append((i, dataset.scenes[j]))
        random.shuffle(drawn_scenes)
        # Trees that begin alike share a pack: those of a dataset, and all about speakers.
        trees: dict[tuple[int, ...], list[tuple[int, Tree]]] = {}
        for owner, (i, scene) in enumerate(drawn_scenes):
            later = bool(random.random() < self._recipe.later_turns)
            questions = self._questions(i, scene, tasks, random)
            renderer = self._renderers[i, later]
            dialogue = self._with_noise(scene.dialogue, random)
            for tree in renderer.trees(dialogue, questions) if questions else ():
                about_speakers = tree.reads[0][1].question.task is Task.SPEAKER
                head = renderer.speaker_head if about_speakers else renderer.head
                trees.setdefault(head, []).append((owner, tree))
        packs = [
            packed
            for head, owned_trees in trees.items()
            for packed in pack(owned_trees, self._recipe.pack_tokens, len(head))
        ]
        # Packs of like length share a step, so that little is padded; steps come in random order.
        size = self._recipe.packs_per_step
        order = sorted(random.permutation(len(packs)), key=lambda p: -len(packs[p]))
        steps = [order[at : at + size] for at in range(0, len(order), size)]
        chosen = [[packs[p] for p in steps[at]] for at in random.permutation(len(steps))]
        return Epoch(chosen, partial(self._step, drawn_scenes=drawn_scenes))

    def _with_noise(self, dialogue: Dialogue, random: np.random.Generator) -> Dialogue:
        """The dialogue as it is, or as speech recognition or a hurried writer would have it."""
        draw = random.random()
        if draw < self._recipe.transcribed:
            return rewritten(dialogue, transcribed, random)
        if draw < self._recipe.transcribed + self._recipe.hurried:
            return rewritten(dialogue, hurried, random)
        return dialogue

    def _questions(
        self, i: int, scene: Scene, tasks: Collection[Task], random: np.random.Generator
    ) -> list[Question]:
        recipe = self._recipe
        utterances = scene.target_utterances
        questions = []
        demonstrations: dict[int, tuple[tuple[str, str], ...]] = {}
        if i in self._banks and random.random() < recipe.demonstrations and utterances:
            bank = self._banks[i]
            count = int(random.integers(1, recipe.demonstrations_most + 1))
            texts = [scene.dialogue.utterances[t].text for t in utterances]
            gold = None
            if recipe.same_label:
                gold = [_likeliest(scene, t, self._datasets[i].labels) for t in utterances]
            neighbours = bank.bank.nearest(
                np.stack([bank.vectors[text] for text in texts]),
                count,
                labels=gold,
                # A demonstration shows a gold label: none of this dialogue's may be seen.
                exclude=[texts] * len(texts),
            )
            demonstrations = {
                t: tuple((d.text, d.label) for d in nearest)
                for t, nearest in zip(utterances, neighbours, strict=True)
            }
        for t in utterances:
            if Task.EMOTION in tasks:
                questions.append(Question(Task.EMOTION, t, demonstrations.get(t, ())))
            if Task.IMPACT in tasks and t > 0:
                questions.append(Question(Task.IMPACT, t))
        if Task.SPEAKER in tasks:
            questions += speaker_questions(scene)
        return questions

    def _step(self, packs: Sequence[Pack], drawn_scenes: Sequence[tuple[int, Scene]]) -> Step:
        reads = [(owner, read) for p in packs for _, owner, read in p.reads]
        options = torch.zeros((len(reads), len(self.answer_tokens)), dtype=torch.bool)
        targets = torch.zeros((len(reads), len(self.answer_tokens)))
        weights = torch.zeros(len(reads))
        tasks = torch.zeros(len(reads), dtype=torch.long)
        for row, (owner, read) in enumerate(reads):
            i, scene = drawn_scenes[owner]
            trie = self._renderers[i, False].trie_for(read.question, scene.dialogue)
            choice = trie.choices[read.choice]
            options[row, [self._column[token] for token in choice.options]] = True
            tasks[row] = TASKS.index(read.question.task)
            weighted = self._target(i, scene, read.question, trie.size)
            for token, answers in zip(choice.options, choice.labels, strict=True):
                targets[row, self._column[token]] = float(weighted[list(answers)].sum())
            # What does not pass this choice of the trie does not count in it.
            weights[row] = targets[row].sum()
            targets[row] /= weights[row].clamp(min=1e-9)
        return Step(collate(packs, _PAD_MULTIPLE), options, targets, weights, tasks)

    def _target(self, i: int, scene: Scene, question: Question, answers: int) -> Target:
        """How probable each answer should be, times the weight of its class."""
        if question.task is Task.SPEAKER:
            speaker = speaker_numbers(scene.dialogue)[question.utterance]
            return one_hot(speaker, answers)
        target = scene.targets[question.utterance]
        assert target is not None  # only utterances with a target are asked about
        return target * self._class_weights[i]


def speaker_questions(scene: Scene) -> list[Question]:
    """Who said each utterance; none where there are not two to choose from."""
    if len(set(speaker_numbers(scene.dialogue))) < 2:
        return []
    return [Question(Task.SPEAKER, t) for t in scene.dialogue.nonblank]


class _NoisyTokenizer(SegmentTokenizer):
    """Leaves some tokens of what people say out, others each time; the template's own all stay."""

    def __init__(self, tokenizer: SegmentTokenizer, share: float) -> None:
        self.__dict__.update(vars(tokenizer))  # else a copy of the same tokenizer
        self._share = share

    def draw_from(self, random: np.random.Generator) -> None:
        """Decide with this generator from now on."""
        self._random = random

    def encode_content(self, text: str, limit: int, *, both_ends: bool = False) -> tuple[int, ...]:
        """See `SegmentTokenizer.encode_content`."""
        ids = super().encode_content(text, limit, both_ends=both_ends)
        if not self._share:
            return ids
        mask = self._random.random(len(ids)) >= self._share
        return tuple(id_ for id_, keep in zip(ids, mask, strict=True) if keep)


def _class_weights(dataset: Dataset, power: float) -> Target:
    counts = np.ones(len(dataset.labels))
    counts += sum(t for scene in dataset.scenes for t in scene.targets if t is not None)
    weights = (counts / counts.sum()) ** -power
    return np.asarray(weights / (weights * counts).sum() * counts.sum(), dtype=np.float32)
