"""Vectors of sentences, for banks of demonstrations."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ercbatch.retrieval.bank import Demonstration

Vectors = npt.NDArray[np.float32]


def unit(vectors: npt.NDArray[np.float64]) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / lengths, dtype=np.float32)


def expected_neighbours(
    bank: list[Demonstration], similarity: npt.NDArray[np.float32], count: int, banned: str
) -> list[Demonstration]:
    """What `nearest` promises, spelled out: rounds over the labels, each by likeness and place."""
    left = [i for i in range(len(bank)) if bank[i].text != banned]
    left.sort(key=lambda i: (-similarity[i], i))
    taken: list[int] = []
    while left and len(taken) < count:
        firsts = {bank[i].label: i for i in reversed(left)}
        best = [i for i in left if i in firsts.values()]
        taken += best
        left = [i for i in left if i not in best]
    return [bank[i] for i in taken[:count]]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
