"""Packs of drawn tokens."""

from __future__ import annotations

import numpy as np

from ercbatch.prompts.packs import Pack, join
from ercbatch.prompts.tree import Question, Read, Segment, Task, lay_out


def pack(seed: int, length: int) -> Pack:
    """Two dialogues' worth of tokens, with answers within and at the end."""
    random = np.random.default_rng(seed)
    trees = []
    for number in range(2):
        words = random.integers(5, 400, length).tolist()
        question = Segment(words[:7], read=Read(Question(Task.EMOTION, 0), 0))
        last = Read(Question(Task.EMOTION, 1), 0)
        trees.append((number, lay_out(Segment(words, [(length // 2, question)], last))))
    return join(trees)
