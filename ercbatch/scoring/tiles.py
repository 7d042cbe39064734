"""Which queries of a pack are held against which keys.

A graph's attention has a fixed number of tiles (`export/graph/tiles.py`): rows that follow each
other, and the keys that any of them sees. Cutting at the right places leaves out most of what the
mask would hide.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ercbatch.prompts.tree import IntArray

ORDER, ROW_COUNTS, KEYS, KEY_COUNTS = "order", "row_counts", "keys", "key_counts"
"""Inputs of a graph: see `Tiles`."""
_PIECES = 24
"""Into which the rows of a pack are divided; tiles are made of whole ones."""
_PER_KEY = 4
"""What it costs to bring a key and its value to a tile, in scores."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of a pack whose tokens stand in another order.

    `order` [length] says where in the pack each token stood. `row_counts` and `key_counts`
    [tiles] tell how many rows each tile has, in that order, and how many of `keys`, which are
    indices in that order, tile after tile.
    """

    order: npt.NDArray[np.int64]
    row_counts: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    key_counts: npt.NDArray[np.int64]


def levels(ends: IntArray) -> npt.NDArray[np.int64]:
    """How many segments each token [length] hangs in: its own, that one's, and so on.

    A segment that ends where the one that it hangs on ends counts as part of it.
    """
    depths = np.empty(len(ends), dtype=np.int64)
    open_ends: list[int] = []
    for index, end in enumerate(ends.tolist()):
        while open_ends and open_ends[-1] <= index:
            open_ends.pop()
        if not open_ends or open_ends[-1] != end:
            open_ends.append(end)
        depths[index] = len(open_ends)
    return depths


def cut(ends: IntArray, count: int) -> Tiles:
    """`count` tiles for a pack: trunks first, and then what hangs on them.

    So a tile of questions sees their trunk and themselves, and not the questions before them. Some
    tiles may be empty.
    """
    order = np.argsort(levels(ends), kind="stable")
    length = len(order)
    places = np.append(np.arange(0, length, -(-length // _PIECES)), length)
    visible = _visible_keys(ends, order, places)
    bounds = _bounds(visible, places, count)
    tiles = [
        # A reduction over no keys at all would be an error.
        np.flatnonzero(visible[a:b].any(axis=0)) if b > a else np.zeros(1, np.int64)
        for a, b in pairwise(bounds)
    ]
    return Tiles(
        order=order,
        row_counts=np.diff(places[bounds]),
        keys=np.concatenate(tiles),
        key_counts=np.array([len(keys) for keys in tiles]),
    )


def _visible_keys(
    ends: IntArray, order: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which keys, in order, each piece sees [pieces, length]; `places` [pieces + 1] bound them."""
    length = len(order)
    piece = np.empty(length, np.int64)
    piece[order] = np.repeat(np.arange(len(places) - 1), np.diff(places))
    counts = np.zeros((len(places) - 1, length + 1), np.int32)  # rows of a piece before each place
    counts[piece, np.arange(1, length + 1)] = 1
    np.cumsum(counts, axis=1, out=counts)
    # Those from a key's own place to its end see it.
    return (counts[:, ends] > counts[:, :-1])[:, order]


def _bounds(visible: npt.NDArray[np.bool_], places: npt.NDArray[np.int64], count: int) -> list[int]:
    """Where to cut pieces into `count` tiles [count + 1], so that least is computed."""
    pieces = len(visible)
    # Of the pieces up to each, the last that sees a key: it is seen since that one.
    latest = np.where(visible, np.arange(pieces)[:, None], -1)
    np.maximum.accumulate(latest, axis=0, out=latest)
    bins = latest + (1 + (pieces + 1) * np.arange(pieces)[:, None])
    since = np.bincount(bins.ravel(), minlength=pieces * (pieces + 1)).reshape(pieces, -1)
    keys = since[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]  # [to, from]
    rows = places[1:, None] - places[None, :-1]
    costs = np.full((pieces, pieces + 1), np.inf)  # of a tile [from, to]
    # Products of one row add up in another order than those of several, and int8 turns that into
    # whole steps.
    min_rows = min(2, places[-1])
    costs[:, 1:] = np.where(rows >= min_rows, keys * (rows + _PER_KEY), np.inf).T
    best = costs[0].copy()
    best[0] = 0
    ways: list[npt.NDArray[np.int64]] = []
    columns = np.arange(pieces + 1)
    for _ in range(count - 1):  # one tile more: from some place on, or empty
        longer = np.vstack([best[:-1, None] + costs, best])
        way = longer.argmin(axis=0)
        best = longer[way, columns]
        ways.append(np.where(way == pieces, columns, way))
    bounds = [pieces]
    for way in reversed(ways):
        bounds.append(int(way[bounds[-1]]))
    return [0, *bounds[::-1]]
