"""Labelled dialogues as a recipe names them: read, mapped, thinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ercbatch.dialogues import Dialogue
from ercbatch.errors import InputError
from ercbatch.inputs.records import read_dialogues
from ercbatch.labels import LabelSet, find_label_set
from train.recipe import Recipe
from train.sources import Source, source_names

Target = npt.NDArray[np.float32]
"""What an utterance should be answered with: a probability for each label [labels]."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A dialogue and the target of each utterance, where it has one; labels are canonical."""

    dialogue: Dialogue
    targets: tuple[Target | None, ...]

    @property
    def target_utterances(self) -> list[int]:
        """The utterances that have a text and a target."""
        return [t for t in self.dialogue.nonblank if self.targets[t] is not None]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Labelled dialogues of one label set."""

    source: Source
    labels: LabelSet
    scenes: tuple[Scene, ...]

    @property
    def has_targets(self) -> bool:
        """Whether an utterance has something to learn."""
        return any(scene.target_utterances for scene in self.scenes)

    @property
    def labelled(self) -> bool:
        """Whether an utterance with a text has a gold label, to be measured by."""
        return any(
            s.dialogue.utterances[t].label is not None
            for s in self.scenes
            for t in s.dialogue.nonblank
        )

    def first(self, count: int) -> Dataset:
        """The dataset of its first dialogues."""
        return replace(self, scenes=self.scenes[:count])


def read_dataset(
    source: Source, labels: LabelSet | None = None, *, need_targets: bool = True
) -> Dataset:
    """Read a dataset; with `need_targets`, one in which an utterance has a label or scores.

    `labels` stand in place of the label set that `source` names.

    Raises:
        InputError: a bad line, a label outside the set, missing scores, no label, no dialogue.
    """
    labels, learnt = labels or source.label_set(), source.learnt()
    written = labels if learnt is None else find_label_set(source.written)
    scenes = [
        _scene(dialogue, labels, (written, learnt), source, f"{source.path}, line {line}")
        for number, (line, dialogue) in enumerate(read_dialogues(Path(source.path)))
        if not source.left_out(number)
    ]
    if not scenes:
        raise InputError(f"{source.path}: no dialogue in it: give labelled dialogues")
    dataset = Dataset(source, labels, tuple(scenes))
    if need_targets and not dataset.has_targets:
        raise InputError(
            f"{source.path}: no utterance has a `label`: training needs labelled dialogues"
        )
    return dataset


_Written = tuple[LabelSet, Mapping[str, str | None] | None]
"""The label set of a file, and what its labels are learnt as (None: as they are)."""


def _scene(
    dialogue: Dialogue, labels: LabelSet, file: _Written, source: Source, place: str
) -> Scene:
    utterances, targets = [], []
    for utterance, turn in zip(dialogue.utterances, dialogue.turns, strict=True):
        label, target = None, None
        if source.soft < 1 and utterance.label is not None:
            label = _learnt(utterance.label, file, place)
            target = _uniform_target([label], labels)
        elif source.soft < 1 and isinstance(turn.get("labels"), list):
            target = _uniform_target(
                [_learnt(name, file, place) for name in turn["labels"]], labels
            )
        if source.soft and not utterance.blank:
            scores = _scores(turn.get("scores"), labels, place)
            target = scores if target is None else source.soft * scores + (1 - source.soft) * target
        utterances.append(replace(utterance, label=label))
        targets.append(target)
    return Scene(Dialogue(tuple(utterances), {}), tuple(targets))


def _learnt(label: object, file: _Written, place: str) -> str | None:
    """The label to learn for one that stands in the file, None to leave it out."""
    written, mapping = file
    canonical = written.canonical(label) if isinstance(label, str) else None
    if canonical is None:
        raise InputError(
            f"{place}: label {label!r} is not in the label set {written.name}: "
            f"{', '.join(written.labels)}"
        )
    return canonical if mapping is None else mapping[canonical]


def _uniform_target(names: Sequence[str | None], labels: LabelSet) -> Target | None:
    """The target in which these labels are equally probable, None if there is none to learn."""
    targets = [one_hot(labels.index(label), len(labels)) for label in names if label is not None]
    return np.mean(targets, axis=0, dtype=np.float32) if targets else None


def one_hot(index: int, size: int) -> Target:
    """The target that is sure of one answer."""
    target: Target = np.eye(size, dtype=np.float32)[index]
    return target


def _scores(value: object, labels: LabelSet, place: str) -> Target:
    """The target that `scores` describe. Their keys may be any known spelling of the labels."""
    by_name = value if isinstance(value, Mapping) else {}
    scores_by_label = {labels.canonical(name): score for name, score in by_name.items()}
    if len(scores_by_label) != len(by_name) or set(scores_by_label) != set(labels.labels):
        raise InputError(
            f"{place}: an utterance has no `scores` over the label set {labels.name}: "
            "run `python -m train teach` first"
        )
    try:
        scores = np.array([scores_by_label[label] for label in labels.labels], dtype=np.float32)
    except (TypeError, ValueError):
        scores = np.full(len(labels), np.nan, dtype=np.float32)
    if not np.isfinite(scores).all():
        raise InputError(f"{place}: `scores` must be numbers: run `python -m train teach`")
    return scores


def dataset_names(datasets: Sequence[Dataset]) -> list[str]:
    """A short name of each dataset's file, different among the datasets of one label set.

    Raises:
        UsageError: a file occurs twice under the same label set.
    """
    names: dict[tuple[str, str], str] = {}
    for labels in {d.labels.name for d in datasets}:
        sources = [d.source for d in datasets if d.labels.name == labels]
        pairs = zip(sources, source_names(sources), strict=True)
        names |= {(labels, source.path): name for source, name in pairs}
    return [names[d.labels.name, d.source.path] for d in datasets]


def without_overlap(dataset: Dataset, held_out: Sequence[Dataset], letters: int) -> Dataset:
    """The dataset without the dialogues that share a line of that many letters with `held_out`."""
    held_out_lines = {
        line for d in held_out for s in d.scenes for line in _lines(s.dialogue, letters)
    }
    scenes = tuple(
        s for s in dataset.scenes if held_out_lines.isdisjoint(_lines(s.dialogue, letters))
    )
    return replace(dataset, scenes=scenes)


def _lines(dialogue: Dialogue, letters: int) -> set[str]:
    lines = {"".join(filter(str.isalpha, u.text.casefold())) for u in dialogue.utterances}
    return {line for line in lines if len(line) >= letters}


def share(datasets: Sequence[Dataset], recipe: Recipe) -> list[Dataset]:
    """The recipe's `fraction` of the datasets, at least one dialogue of each, seeded.

    With `mix = "ratio"` each is sampled by it, with `"total"` all are merged and then sampled.
    """
    if recipe.fraction == 1:
        return list(datasets)
    random = np.random.default_rng([recipe.seed, 0])
    sizes = [len(d.scenes) for d in datasets]
    if recipe.mix == "total":
        owners = np.repeat(np.arange(len(datasets)), sizes)
        drawn_owners = random.permutation(owners)[: round(recipe.fraction * len(owners))]
        counts = np.bincount(drawn_owners, minlength=len(datasets)).tolist()
    else:
        counts = [round(recipe.fraction * size) for size in sizes]
    return [
        replace(d, scenes=tuple(d.scenes[j] for j in random.permutation(size)[: max(1, count)]))
        for d, size, count in zip(datasets, sizes, counts, strict=True)
    ]
