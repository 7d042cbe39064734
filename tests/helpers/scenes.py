"""Recipes, dialogues and datasets made in a line."""

from __future__ import annotations

from typing import Any

from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.labels import label_set
from train.datasets import Dataset, Scene, one_hot
from train.recipe import Recipe
from train.sources import Source


def recipe(**values: Any) -> Recipe:
    return Recipe(base="x", train=(Source("y", "meld"),), template="compact", **values)


def scene(*texts: str, labels: str = "meld") -> Scene:
    """A dialogue of two speakers, every turn neutral."""
    utterances = tuple(Utterance(text, "AB"[t % 2]) for t, text in enumerate(texts))
    neutral = one_hot(label_set(labels).index("neutral"), len(label_set(labels)))
    return Scene(Dialogue(utterances), (neutral,) * len(texts))


def dataset(*scenes: Scene) -> Dataset:
    return Dataset(Source("y", "meld"), label_set("meld"), scenes)
