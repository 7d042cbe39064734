"""Labels as answers: their tokens as a trie, and the small head that scores them.

A label's probability is the product, down the trie, of the model's choice among the tokens that
are possible there. So the labels of a set always sum to one, a label is never outside its set,
and a label of many tokens pays nothing for them. Where all labels start with different tokens
(the usual case) the trie is a single choice, read at one position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ercbatch.errors import UsageError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Choice:
    """One node of the trie where labels part.

    `path` are the tokens that lead here from the question, `parent` is the index of the choice
    above (-1 for the root), `options` the tokens to choose among, and `labels[i]` the indices of
    the labels that lie behind `options[i]`.
    """

    path: tuple[int, ...]
    parent: int
    options: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class AnswerTrie:
    """The choices of a label set, root first, parents before children."""

    choices: tuple[Choice, ...]
    size: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Every token that some choice needs, ascending."""
        return tuple(sorted({token for choice in self.choices for token in choice.options}))

    def log_probabilities(self, logits: Sequence[FloatArray]) -> npt.NDArray[np.float64]:
        """Label log-probabilities [labels] from each choice's option logits [options]."""
        total = np.zeros(self.size, dtype=np.float64)
        for choice, row in zip(self.choices, logits, strict=True):
            wide = np.asarray(row, dtype=np.float64)
            top = wide.max()
            log_probabilities = wide - top - np.log(np.exp(wide - top).sum())
            for value, labels in zip(log_probabilities, choice.labels, strict=True):
                total[list(labels)] += value
        return total


def answer_trie(sequences: Sequence[tuple[int, ...]], end: tuple[int, ...]) -> AnswerTrie:
    """The trie of the labels' token sequences.

    `end` is what follows a label; it is used only where one label is the beginning of another.

    Raises:
        UsageError: two labels have the same tokens, or a label has none.
    """
    for i, sequence in enumerate(sequences):
        if not sequence:
            raise UsageError("a label has no tokens with this tokenizer: rename it")
        if sequence in sequences[:i]:
            raise UsageError("two labels have the same tokens with this tokenizer: rename one")
    ended = [
        sequence + end[:1]
        if any(o != sequence and o[: len(sequence)] == sequence for o in sequences)
        else sequence
        for sequence in sequences
    ]
    choices: list[Choice] = []

    def visit(members: list[int], depth: int, parent: int) -> None:
        while len({ended[i][depth : depth + 1] for i in members}) == 1:
            if depth >= len(ended[members[0]]):
                return
            depth += 1
        groups: dict[int, list[int]] = {}
        for i in members:
            groups.setdefault(ended[i][depth], []).append(i)
        index = len(choices)
        choices.append(
            Choice(
                path=ended[members[0]][:depth],
                parent=parent,
                options=tuple(groups),
                labels=tuple(tuple(group) for group in groups.values()),
            )
        )
        for group in groups.values():
            if len(group) > 1:
                visit(group, depth + 1, index)

    if len(sequences) > 1:
        visit(list(range(len(sequences))), 0, -1)
    return AnswerTrie(tuple(choices), len(sequences))


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The rows of the output embedding that label sets need.

    `tokens` [rows] are vocabulary ids, ascending; `weight` is [rows, hidden], `bias` [rows].
    `scale` and `softcap` are what some architectures do to their logits afterwards
    (Granite's and Cohere's logit scale, Gemma's `final_logit_softcapping`; 0 is none).
    """

    tokens: npt.NDArray[np.int64]
    weight: FloatArray
    bias: FloatArray
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, states: FloatArray) -> FloatArray:
        """Logits [reads, rows] of hidden states [reads, hidden]."""
        logits = (states @ self.weight.T + self.bias) * np.float32(self.scale)
        if self.softcap:
            logits = np.tanh(logits / self.softcap) * self.softcap
        return logits.astype(np.float32, copy=False)

    def columns(self, tokens: Sequence[int]) -> npt.NDArray[np.int64]:
        """Where these tokens stand among the rows."""
        return np.searchsorted(self.tokens, np.asarray(tokens, dtype=np.int64))

    def tensors(self) -> Mapping[str, npt.NDArray[np.generic]]:
        """What `answer_head.safetensors` holds."""
        return {
            "tokens": self.tokens,
            "weight": self.weight,
            "bias": self.bias,
            "scale": np.asarray([self.scale, self.softcap], dtype=np.float32),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, npt.NDArray[np.generic]]) -> AnswerHead:
        """Read what `tensors` gave.

        Raises:
            KeyError, ValueError: it is something else.
        """
        scale, softcap = (float(value) for value in tensors["scale"])
        tokens = tensors["tokens"].astype(np.int64)
        weight = tensors["weight"].astype(np.float32)
        bias = tensors["bias"].astype(np.float32)
        if weight.ndim != 2 or not tokens.shape == bias.shape == weight.shape[:1]:
            raise ValueError("the tensors of the answer head do not fit together")
        if (np.diff(tokens) <= 0).any():
            raise ValueError("the tokens of the answer head are not in order")
        return cls(tokens, weight, bias, scale, softcap)
