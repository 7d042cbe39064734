"""Scoring: packs in, a probability for every label of every question out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ercbatch.errors import BundleError
from ercbatch.prompts.answers import AnswerHead, AnswerTrie, FloatArray
from ercbatch.prompts.packs import Pack


class Scorer(ABC):
    """Runs a model over packs."""

    packages: ClassVar[tuple[str, ...]]
    """The installed packages whose release its numbers depend on."""
    head: AnswerHead
    parallel_packs: int = 1
    """How many packs it scores best at a time, each in a thread."""
    longest_pack: ClassVar[int | None] = None
    """Most tokens of a pack that holds several trees; None if there is no limit."""
    placement: Mapping[str, str | int]
    """Where a pack is computed, as far as its numbers depend on it: threads, and a GPU."""

    @abstractmethod
    def logits(self, pack: Pack) -> FloatArray:
        """Logits [reads, rows of the head] of a pack, in the order of its reads."""

    @abstractmethod
    def describe(self) -> str:
        """What runs the model, and where."""

    def answers(
        self, pack: Pack, trie: AnswerTrie
    ) -> Iterator[tuple[int, int, npt.NDArray[np.float64]]]:
        """(owner, utterance, label log-probabilities [labels]) of every question in a pack.

        All questions of the pack are answered from `trie`.
        """
        logits = self.logits(pack)
        columns = [self.head.columns(choice.options) for choice in trie.choices]
        rows: dict[tuple[int, int], list[FloatArray]] = {}
        for row, (_, owner, read) in zip(logits, pack.reads, strict=True):
            per_choice = rows.setdefault((owner, read.question.utterance), [row[:0]] * len(columns))
            per_choice[read.choice] = row[columns[read.choice]]
        for (owner, utterance), choices in rows.items():
            yield owner, utterance, trie.log_probabilities(choices)


class StateScorer(Scorer):
    """One whose model ends before the vocabulary. Variants: `OnnxScorer`, `TorchScorer`."""

    @abstractmethod
    def states(self, pack: Pack) -> FloatArray:
        """Hidden states [reads, hidden] of a pack, in the order of its reads."""

    def logits(self, pack: Pack) -> FloatArray:
        """See `Scorer.logits`."""
        states = self.states(pack)
        if states.shape != (len(pack.reads), self.head.weight.shape[1]):
            raise BundleError(
                f"the model gives states {states.shape} for {len(pack.reads)} answers, each of "
                f"{self.head.weight.shape[1]} numbers: export the bundle again"
            )
        return self.head.logits(states)


def calibrated(
    log_probabilities: npt.NDArray[np.float64],
    temperature: float,
    offsets: Sequence[float] = (),
) -> npt.NDArray[np.float64]:
    """Probabilities [..., labels] after temperature scaling (Guo et al. 2017).

    With `offsets`, one for each label, it is bias-corrected temperature scaling (Alexandari et al.
    2020), which also moves labels towards what is common in other data.
    """
    scaled = log_probabilities / temperature
    if len(offsets):
        scaled = scaled + np.asarray(offsets)
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    odds = np.exp(scaled)
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))
