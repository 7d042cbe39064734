"""The demonstration bank: labelled examples, found by the likeness of their sentences."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import numpy.typing as npt
import orjson
from safetensors.numpy import load_file, save_file

from ercbatch.errors import BundleError, InputError
from ercbatch.labels import LabelSet

Vectors = npt.NDArray[np.float32]

TEXTS = "demonstrations.jsonl"
VECTORS = "demonstrations.safetensors"
INDEX = "demonstrations.hnsw"

_EXACT_BELOW = 2_000
"""Banks smaller than this are searched exactly: it is as fast, and needs no index."""
_CANDIDATES = 32
"""Candidates taken for each demonstration asked for, out of which labels are balanced."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A labelled example."""

    text: str
    label: str


class DemonstrationBank:
    """Demonstrations and their unit vectors [n, dim].

    Under 2,000 entries the search is exact; above, an hnswlib cosine index is built on one
    thread with a fixed seed, so the same bank always gives the same index.
    """

    def __init__(
        self,
        demonstrations: Sequence[Demonstration],
        vectors: Vectors,
        index: hnswlib.Index | None = None,
    ) -> None:
        if len(demonstrations) != len(vectors):
            raise ValueError("a bank needs one vector for each demonstration")
        self.demonstrations = tuple(demonstrations)
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._keys = [_key(d.text) for d in self.demonstrations]
        self._by_label: dict[str, npt.NDArray[np.int64]] = {
            label: np.array([i for i, d in enumerate(demonstrations) if d.label == label])
            for label in dict.fromkeys(d.label for d in demonstrations)
        }
        self._index = index
        if index is None and len(demonstrations) >= _EXACT_BELOW:
            self._index = build_index(self.vectors)

    def __len__(self) -> int:
        return len(self.demonstrations)

    def nearest(
        self,
        queries: Vectors,
        count: int,
        *,
        labels: Sequence[str | None] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> list[tuple[Demonstration, ...]]:
        """The most similar demonstrations for each query vector [n, dim], best first.

        Balanced over labels: no label comes twice before every label among the candidates has
        come once. Ties go to the lower index.

        Args:
            count: how many for each query, where the bank has as many.
            labels: for each query the only label to return; training's same-label rule. Such a
                search is exact.
            exclude: for each query a text never to return: the utterance itself.
        """
        if not len(self) or not count:
            return [()] * len(queries)
        found = []
        for row, query in enumerate(queries):
            label = labels[row] if labels is not None else None
            banned = _key(exclude[row]) if exclude is not None else None
            candidates = self._candidates(query, count, label)
            usable = [i for i in candidates if self._keys[i] != banned]
            balanced = usable if label is not None else self._balanced(usable)
            found.append(tuple(self.demonstrations[i] for i in balanced[:count]))
        return found

    def _candidates(self, query: Vectors, count: int, label: str | None) -> list[int]:
        """Indices by falling similarity."""
        wanted = count * _CANDIDATES
        if label is not None:
            members = self._by_label.get(label, np.empty(0, np.int64))
            order = np.argsort(-(self.vectors[members] @ query), kind="stable")[:wanted]
            return [int(i) for i in members[order]]
        if self._index is None:
            order = np.argsort(-(self.vectors @ query), kind="stable")[:wanted]
            return [int(i) for i in order]
        wanted = min(wanted, len(self))
        self._index.set_ef(max(64, 2 * wanted))
        ids, distances = self._index.knn_query(query[None], k=wanted, num_threads=1)
        return [int(i) for _, i in sorted(zip(distances[0], ids[0], strict=True))]

    def _balanced(self, candidates: list[int]) -> list[int]:
        rounds: dict[str, int] = {}
        keyed = []
        for place, i in enumerate(candidates):
            label = self.demonstrations[i].label
            rounds[label] = rounds.get(label, 0) + 1
            keyed.append((rounds[label], place, i))
        return [i for _, _, i in sorted(keyed)]

    def restricted(self, labels: LabelSet) -> DemonstrationBank:
        """The bank under another label set: its names; entries with no label there left out."""
        renamed = [(i, labels.canonical(d.label)) for i, d in enumerate(self.demonstrations)]
        kept = [(i, label) for i, label in renamed if label is not None]
        if len(kept) == len(self) and all(self.demonstrations[i].label == to for i, to in kept):
            return self
        return DemonstrationBank(
            [Demonstration(self.demonstrations[i].text, label) for i, label in kept],
            self.vectors[[i for i, _ in kept]],
        )

    def save(self, folder: Path) -> None:
        """Write the texts, the vectors and (for a large bank) the index."""
        lines = (orjson.dumps({"text": d.text, "label": d.label}) for d in self.demonstrations)
        (folder / TEXTS).write_bytes(b"".join(line + b"\n" for line in lines))
        save_file({"vectors": self.vectors}, folder / VECTORS)
        (folder / INDEX).unlink(missing_ok=True)
        if self._index is not None:
            self._index.save_index(str(folder / INDEX))

    @classmethod
    def load(cls, folder: Path, digests: Mapping[str, str]) -> DemonstrationBank:
        """Read what `save` wrote; `digests` maps file names to SHA-256.

        hnswlib trusts the header of an index file, so the file is loaded only when its bytes are
        the ones that the digest names; otherwise the index is built again from the vectors.

        Raises:
            BundleError: the texts and vectors do not fit together.
        """
        demonstrations = read_examples(folder / TEXTS)
        vectors = load_file(folder / VECTORS)["vectors"]
        if vectors.ndim != 2 or len(vectors) != len(demonstrations):
            raise BundleError(
                f"{folder}: {TEXTS} and {VECTORS} do not fit together: export the bundle again"
            )
        index = None
        path = folder / INDEX
        known = digests.get(INDEX) if len(vectors) >= _EXACT_BELOW and path.exists() else None
        if known is not None and hashlib.sha256(path.read_bytes()).hexdigest() == known:
            index = hnswlib.Index(space="cosine", dim=vectors.shape[1])
            index.load_index(str(path), max_elements=len(vectors))
        return cls(demonstrations, vectors, index)


def build_index(vectors: Vectors) -> hnswlib.Index:
    """An hnswlib cosine index; the same vectors always give the same bytes."""
    index = hnswlib.Index(space="cosine", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=16, ef_construction=200, random_seed=42)
    index.add_items(vectors, np.arange(len(vectors)), num_threads=1)
    return index


def read_examples(path: Path, labels: LabelSet | None = None) -> list[Demonstration]:
    """Read labelled examples: lines of {"text", "label"}, or of labelled dialogues.

    With `labels`, each label becomes the set's own name for it.

    Raises:
        InputError: a bad line, a label outside the set, or no example at all.
    """
    examples: list[Demonstration] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record: Any = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error}): mend or remove the line") from error
        turns = record.get("utterances", [record]) if isinstance(record, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise InputError(f'{where}: not an example: write {{"text": …, "label": …}}')
        for turn in turns:
            text, label = turn.get("text"), turn.get("label")
            if label is None and turn is not record:
                continue
            if not isinstance(text, str) or not text.strip() or not isinstance(label, str):
                raise InputError(f"{where}: an example needs a `text` and a `label`: add them")
            name = label if labels is None else labels.canonical(label)
            if name is None:
                assert labels is not None
                raise InputError(
                    f"{where}: label {label!r} is not in the label set {labels.name}: "
                    f"choose from {', '.join(labels.labels)}"
                )
            examples.append(Demonstration(text, name))
    if not examples:
        raise InputError(f"{path}: no labelled example in it: give lines of text and label")
    return examples


def balance(
    demonstrations: Sequence[Demonstration], per_label: int, seed: int
) -> list[Demonstration]:
    """At most `per_label` demonstrations of each label, drawn at random; order is kept."""
    random = np.random.default_rng(seed)
    kept: set[int] = set()
    for label in dict.fromkeys(d.label for d in demonstrations):
        members = [i for i, d in enumerate(demonstrations) if d.label == label]
        kept.update(int(i) for i in random.permutation(members)[:per_label])
    return [d for i, d in enumerate(demonstrations) if i in kept]


def _key(text: str) -> str:
    """What makes two texts the same utterance: letters and digits, folded."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if c.isalnum()) or folded.strip()
