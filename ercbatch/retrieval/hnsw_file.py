"""An hnswlib index file, looked through before hnswlib follows what stands in it.

hnswlib (0.8, `hnswalg.h`) believes every number of such a file: a link beyond the last element is
memory of somebody else. The file is a header, a record for each element (its links on the lowest
level, its vector, its label), and for each element the lists of its links on higher levels.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_HEADER = struct.Struct("<6QiI3QdQ")
"""Offset of level 0, capacity, elements, bytes an element, offsets of label and vector, highest
level, entry point, links on higher levels and on level 0, M, the levels' factor, and how many
candidates it was built with."""
_MAX_LEVELS = 64
"""More levels than a bank of any size has."""


def is_sound(path: Path, elements: int, dim: int, links: int) -> bool:
    """Whether a file is an index of so many vectors [dim], with M = `links`, that can be followed.

    What it says of likeness may still be wrong; the labels that it gives are from 0 to
    elements - 1, each once.
    """
    data = np.fromfile(path, dtype=np.uint8)
    if len(data) < _HEADER.size:
        return False
    head = _HEADER.unpack(data[: _HEADER.size].tobytes())
    highest, entry, upper_links, lowest_links, m, factor, _ = head[6:]
    element = _element(2 * links, dim)
    size = element.itemsize
    if head[:6] != (0, elements, elements, size, size - 8, 4 + 8 * links):
        return False
    if (upper_links, lowest_links, m) != (links, 2 * links, links) or not 0 < factor < np.inf:
        return False
    start = _HEADER.size + elements * size
    if not (0 <= highest < _MAX_LEVELS and entry < elements and start <= len(data)):
        return False
    lowest = data[_HEADER.size : start].view(element)
    if not (np.sort(lowest["label"]) == np.arange(elements)).all():
        return False
    return _links_lead_somewhere(lowest, np.zeros(elements, np.int64), 0) and _is_sound_above(
        data[start:], elements, links, highest, entry
    )


def _element(links: int, dim: int) -> np.dtype[Any]:
    return np.dtype([*_list(links), ("vector", "<f4", dim), ("label", "<u8")])


def _list(links: int) -> list[Any]:
    """A list of links: how many there are, the mark of a deleted element, and the links."""
    return [("count", "<u2"), ("deleted", "<u2"), ("links", "<u4", links)]


def _links_lead_somewhere(
    lists: npt.NDArray[Any], levels: npt.NDArray[np.int64], level: int
) -> bool:
    """Whether the links of lists on a level lead to elements that have such a list too."""
    capacity = lists["links"].shape[1]
    if (lists["count"] > capacity).any() or lists["deleted"].any():
        return False
    targets = lists["links"][np.arange(capacity) < lists["count"][:, None]]
    return bool((targets < len(levels)).all() and (levels[targets] >= level).all())


def _is_sound_above(
    data: npt.NDArray[np.uint8], elements: int, links: int, highest: int, entry: int
) -> bool:
    kind = np.dtype(_list(links))
    levels = np.zeros(elements, np.int64)
    lists: list[list[int]] = [[] for _ in range(highest)]
    raw, place = data.tobytes(), 0
    for i in range(elements):
        if place + 4 > len(raw):
            return False
        size = int.from_bytes(raw[place : place + 4], "little")
        place += 4
        levels[i], remainder = divmod(size, kind.itemsize)
        if remainder or levels[i] > highest or place + size > len(raw):
            return False
        for level in range(levels[i]):
            lists[level].append(place + level * kind.itemsize)
        place += size
    if place != len(raw) or levels[entry] != highest:
        return False
    return all(
        _links_lead_somewhere(
            np.frombuffer(b"".join(raw[at : at + kind.itemsize] for at in places), kind), levels, n
        )
        for n, places in enumerate(lists, start=1)
    )
