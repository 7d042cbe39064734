"""Packs: trees one after another in one sequence, for one pass of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ercbatch.prompts.tree import IntArray, Read, Tree


@dataclass(frozen=True, slots=True)
class Pack:
    """Trees one after another in one sequence, invisible to each other.

    `reads` are (index, owner, Read): the position in the pack, and which of the packed items
    (dialogues, usually) the answer belongs to. The first `shared` tokens are the beginning of each.
    """

    tokens: IntArray
    positions: IntArray
    ends: IntArray
    reads: tuple[tuple[int, int, Read], ...]
    shared: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


def join(trees: Sequence[tuple[int, Tree]]) -> Pack:
    """One pack of (owner, tree) pairs."""
    tokens = np.concatenate([tree.tokens for _, tree in trees])
    positions = np.concatenate([tree.positions for _, tree in trees])
    ends = np.empty_like(tokens)
    reads: list[tuple[int, int, Read]] = []
    offset = 0
    for owner, tree in trees:
        ends[offset : offset + len(tree)] = tree.ends + np.int32(offset)
        reads += [(offset + index, owner, read) for index, read in tree.reads]
        offset += len(tree)
    return Pack(tokens, positions, ends, tuple(reads))


def split(pack: Pack) -> Iterator[Pack]:
    """The trees that `join` or `graft` put into a pack, in its order, each a pack of its own.

    All of a tree, or of what follows its shared beginning, hangs on its first token.
    """
    start = shared = pack.shared
    while start < len(pack):
        end = int(pack.ends[start])
        place = np.r_[:shared, start:end]
        shift = start - shared
        reads = tuple((i - shift, owner, read) for i, owner, read in pack.reads if start <= i < end)
        ends = np.minimum(pack.ends[place], end) - np.int32(shift)
        yield Pack(pack.tokens[place], pack.positions[place], ends, reads)
        start = end


def graft(trees: Sequence[tuple[int, Tree]], shared: int) -> Pack:
    """One pack of (owner, tree) pairs that begin with the same `shared` tokens, laid out once.

    The rest of each tree hangs on the last of them: a tree of trees, in which every answer sees
    what it saw in its own.
    """
    first = trees[0][1]
    suffixes = [(owner, tree, len(tree) - shared) for owner, tree in trees]
    length = shared + sum(size for *_, size in suffixes)
    tokens = np.empty(length, dtype=np.int32)
    positions = np.empty_like(tokens)
    ends = np.full_like(tokens, length)
    tokens[:shared], positions[:shared] = first.tokens[:shared], first.positions[:shared]
    reads: list[tuple[int, int, Read]] = []
    offset = shared
    for owner, tree, size in suffixes:
        place = slice(offset, offset + size)
        tokens[place], positions[place] = tree.tokens[shared:], tree.positions[shared:]
        ends[place] = tree.ends[shared:] + np.int32(offset - shared)
        reads += [(offset - shared + index, owner, read) for index, read in tree.reads]
        offset += size
    return Pack(tokens, positions, ends, tuple(reads), shared)


class Packer:
    """Fills packs of at most `length` tokens in input order; a longer tree is a pack of its own.

    All trees begin with the same `shared` tokens, which a pack holds once. Which trees share a pack
    depends on nothing but the trees' order and sizes.
    """

    def __init__(self, length: int, shared: int) -> None:
        self._length = length
        self._shared = shared
        self._trees: list[tuple[int, Tree]] = []
        self._used_tokens = shared

    def add(self, owner: int, tree: Tree) -> Pack | None:
        """Take a tree; the pack that it no longer fitted into, if it filled one."""
        size = len(tree) - self._shared
        full_pack = self.flush() if self._used_tokens + size > self._length else None
        self._trees.append((owner, tree))
        self._used_tokens += size
        return full_pack

    def flush(self) -> Pack | None:
        """The pack begun, as it is."""
        packed = graft(self._trees, self._shared) if self._trees else None
        self._trees, self._used_tokens = [], self._shared
        return packed


def pack(trees: Iterable[tuple[int, Tree]], length: int, shared: int) -> Iterator[Pack]:
    """All packs of (owner, tree) pairs: see `Packer`."""
    packer = Packer(length, shared)
    for owner, tree in trees:
        full_pack = packer.add(owner, tree)
        if full_pack is not None:
            yield full_pack
    last_pack = packer.flush()
    if last_pack is not None:
        yield last_pack
