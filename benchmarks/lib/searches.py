"""The searches that `benchmarks.retrieval` compares, and what they should find."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ercbatch.digests import file_sha256
from ercbatch.engine import RETRIEVED_TOGETHER
from ercbatch.retrieval.bank import Demonstration, DemonstrationBank, Vectors

COUNTS = (1, 3, 5)
"""Results for each query, of which recall is told."""
_TIE = 1e-5
"""Similarities that differ by less are equal: products round differently."""
Places = list[list[int]]
"""Places in the bank, for each query."""


@dataclass(frozen=True, slots=True)
class Queries:
    """Texts that are looked up, and their vectors [n, dim]."""

    texts: list[str]
    vectors: Vectors


class Engine(Protocol):
    """A search for the nearest entries. `metrics` are those of building its index."""

    metrics: dict[str, Any]

    def find(self, count: int) -> tuple[Places, float]:
        """The places of `count` entries for each of its queries, and how many queries a second."""
        ...


class OwnBank:
    """The package's bank, asked in one of its ways."""

    def __init__(
        self,
        bank: DemonstrationBank,
        queries: Queries,
        metrics: dict[str, Any],
        labels: Sequence[str] | None = None,
    ) -> None:
        self.metrics = metrics
        self._bank = bank
        self._queries = queries
        self._labels = labels
        self._places = {d.text: i for i, d in enumerate(bank.demonstrations)}

    def find(self, count: int) -> tuple[Places, float]:
        """See `Engine.find`."""
        neighbours: list[tuple[Demonstration, ...]] = []
        began = time.perf_counter()
        for at in range(0, len(self._queries.texts), RETRIEVED_TOGETHER):
            place = slice(at, at + RETRIEVED_TOGETHER)
            neighbours += self._bank.nearest(
                self._queries.vectors[place],
                count,
                labels=None if self._labels is None else self._labels[place],
                exclude=[[text] for text in self._queries.texts[place]],
            )
        speed = len(neighbours) / (time.perf_counter() - began)
        return [[self._places[d.text] for d in nearest] for nearest in neighbours], speed


class Peer:
    """A search of `peer_search.py`, in a process on one thread, asked `batch` queries at once.

    Raises:
        RuntimeError: the process ends before it answers.
    """

    def __init__(
        self, kind: str, python: str, vectors: Path, queries: Path, ef: int, batch: int
    ) -> None:
        script = Path(__file__).with_name("peer_search.py")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._request = {"queries": str(queries), "batch": batch}
        self._process = subprocess.Popen(
            [python, str(script), kind, str(vectors), str(ef)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
        )
        answer = self._answer()
        self.version: str = answer.pop("version")
        self.metrics: dict[str, Any] = {k: round(v, 2) for k, v in answer.items()}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r}: ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def find(self, count: int) -> tuple[Places, float]:
        """See `Engine.find`.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None
        print(json.dumps({**self._request, "count": count}), file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["ids"], len(answer["ids"]) / answer["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def open_bank(
    demonstrations: list[Demonstration], vectors: Vectors
) -> tuple[DemonstrationBank, dict[str, Any]]:
    """A bank built, saved and loaded, as a bundle's is; how long that takes, and its files."""
    began = time.perf_counter()
    built = DemonstrationBank(demonstrations, vectors)
    build = time.perf_counter() - began
    with TemporaryDirectory() as name:
        folder = Path(name)
        built.save(folder)
        del built
        digests, size = {}, 0
        for path in folder.iterdir():
            size += path.stat().st_size
            digests[path.name] = file_sha256(path)
        began = time.perf_counter()
        bank = DemonstrationBank.load(folder, digests)
        load = time.perf_counter() - began
    metrics = {
        "build_seconds": round(build, 2),
        "load_seconds": round(load, 2),
        "disk_mb": round(size / 1e6, 2),
    }
    return bank, metrics


class Truth:
    """What exact search finds, by label, and how similar it is."""

    def __init__(
        self,
        labels: Sequence[str],
        vectors: Vectors,
        queries: Vectors,
        own_places: Sequence[int | None],
    ) -> None:
        """`own_places` is for each query its own place in the bank, which is never found."""
        self._labels = labels
        self._vectors = vectors
        self._queries = queries
        self._own_places = own_places
        self._best: list[dict[str, list[tuple[float, int]]]] = []
        members = {label: np.flatnonzero(np.array(labels) == label) for label in set(labels)}
        for at in range(0, len(queries), RETRIEVED_TOGETHER):
            similar = queries[at : at + RETRIEVED_TOGETHER] @ vectors.T
            for row, place in zip(similar, own_places[at : at + RETRIEVED_TOGETHER], strict=True):
                if place is not None:
                    row[place] = -np.inf
                self._best.append({label: _best(row, places) for label, places in members.items()})

    def recall(self, results: Places, count: int) -> float:
        """The share found of what exact search gives in rounds over the labels.

        `results` may be of the first queries alone.
        """
        hits = expected = 0
        for number, (best, places) in enumerate(zip(self._best, results, strict=False)):
            ranked = sorted(
                (turn, -similarity, label)
                for label, nearest in best.items()
                for turn, (similarity, _) in enumerate(nearest)
                if similarity > -np.inf
            )[:count]
            thresholds: dict[str, float] = {}
            for _, negative, label in ranked:
                thresholds[label] = min(-negative, thresholds.get(label, 1.0))
            expected += len(ranked)
            for i in places:
                similarity = float(self._vectors[i] @ self._queries[number])
                close = similarity >= thresholds.get(self._labels[i], np.inf) - _TIE
                hits += close and i != self._own_places[number]
        return hits / expected


def _best(row: npt.NDArray[np.float32], members: npt.NDArray[np.int64]) -> list[tuple[float, int]]:
    """The most similar members, as many as are ever asked for: (similarity, place)."""
    count = min(max(COUNTS), len(members))
    similarities = row[members]
    places = np.argpartition(-similarities, count - 1)[:count]
    return sorted(((float(similarities[i]), int(members[i])) for i in places), reverse=True)
