"""The demonstration bank: labelled examples, found by the likeness of their sentences."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hnswlib
import numpy as np
import numpy.typing as npt
import orjson
from safetensors.numpy import load_file, save_file

from ercbatch.dialogues import parse_dialogue
from ercbatch.digests import file_sha256
from ercbatch.errors import BundleError, InputError, RecordError
from ercbatch.labels import LabelSet
from ercbatch.retrieval.encoder import SentenceEncoder
from ercbatch.retrieval.hnsw_file import is_sound

Vectors = npt.NDArray[np.float32]

TEXTS = "demonstrations.jsonl"
VECTORS = "demonstrations.safetensors"
INDEX = "demonstrations.hnsw"

_EXACT_BELOW = 2_000
"""Banks smaller than this are searched exactly: it is as fast, and needs no index."""
_LINKS = 16
"""hnswlib's M: links of an element in the index, twice as many on its lowest level."""
CANDIDATES = 32
"""Candidates taken for each demonstration asked for, out of which labels are balanced."""
_WIDENING = 8
"""Times as many are taken where those hold too few labels, before all of the bank is searched."""


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
        self._keys = [text_key(d.text) for d in self.demonstrations]
        members: dict[str, list[int]] = {}
        for i, demonstration in enumerate(self.demonstrations):
            members.setdefault(demonstration.label, []).append(i)
        self._by_label = {label: np.array(indices, np.int64) for label, indices in members.items()}
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
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[tuple[Demonstration, ...]]:
        """The most similar demonstrations for each query.

        They are taken in rounds, each of which holds the best remaining demonstration of every
        label, by falling similarity. So none of the results shares a label with another until
        every label has come once. Equal similarities rank by place in the bank.

        Args:
            queries: vectors [n, dim].
            count: how many for each query; fewer only if the bank has no more.
            labels: for each query the only label to return; training's same-label rule. Such a
                search is exact.
            exclude: for each query the texts never to return (the utterance itself, say), whatever
                their case, punctuation and spaces.
        """
        neighbours = []
        for row, query in enumerate(queries):
            label = labels[row] if labels is not None else None
            excluded = {text_key(text) for text in exclude[row]} if exclude is not None else set()
            indices = self._search(query, count, label, excluded) if count else []
            neighbours.append(tuple(self.demonstrations[i] for i in indices))
        return neighbours

    def _search(
        self, query: Vectors, count: int, label: str | None, excluded: Collection[str]
    ) -> list[int]:
        if label is not None:
            members = self._by_label.get(label, np.empty(0, np.int64))
            return self._rounds(self._ranked(query, members), count, excluded, 1)[0]
        labels = len(self._by_label)
        if self._index is not None:
            for candidate_count in (count * CANDIDATES, count * CANDIDATES * _WIDENING):
                candidates = self._approximate(self._index, query, candidate_count)
                indices, complete = self._rounds(candidates, count, excluded, labels)
                if complete:
                    return indices
        return self._rounds(self._ranked(query), count, excluded, labels)[0]

    def _ranked(
        self, query: Vectors, members: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """All demonstrations, or the members alone, by falling similarity."""
        vectors = self.vectors if members is None else self.vectors[members]
        # Not a BLAS product: that rounds a row by where it stands, and equal texts must tie.
        order = np.argsort(-np.einsum("nd,d->n", vectors, query), kind="stable")
        return order if members is None else members[order]

    def _approximate(
        self, index: hnswlib.Index, query: Vectors, count: int
    ) -> npt.NDArray[np.int64]:
        """The nearest by the index, by falling similarity; none where the index fails."""
        count = min(count, len(self))
        index.set_ef(search_breadth(count, len(self)))
        try:
            ids, distances = index.knn_query(query[None], k=count, num_threads=1)
        except RuntimeError:  # many equal vectors can cut an hnsw graph into islands
            return np.empty(0, np.int64)
        order = np.lexsort((ids[0], distances[0]))
        return np.asarray(ids[0][order], np.int64)

    def _rounds(
        self, ranked: npt.NDArray[np.int64], count: int, excluded: Collection[str], labels: int
    ) -> tuple[list[int], bool]:
        """(the first `count` in rounds over the labels, whether more candidates change nothing)."""
        depth = -(-count // labels) if labels else 0
        label_counts: dict[str, int] = {}
        ranking: list[tuple[int, int, int]] = []
        full_labels = 0
        for place, i in enumerate(ranked.tolist()):
            if self._keys[i] in excluded:
                continue
            label = self.demonstrations[i].label
            label_counts[label] = label_counts.get(label, 0) + 1
            ranking.append((label_counts[label], place, i))
            full_labels += label_counts[label] == depth
            if full_labels == min(count, labels):
                break
        return [i for _, _, i in sorted(ranking)[:count]], full_labels == min(count, labels)

    def restricted(self, labels: LabelSet) -> DemonstrationBank:
        """The bank under another label set: its names; entries with no label there left out."""
        names = [labels.canonical(d.label) for d in self.demonstrations]
        if names == [d.label for d in self.demonstrations]:
            return self
        indices = [i for i, label in enumerate(names) if label is not None]
        return DemonstrationBank(
            [Demonstration(self.demonstrations[i].text, names[i] or "") for i in indices],
            self.vectors if len(indices) == len(self) else self.vectors[indices],
            self._index if len(indices) == len(self) else None,
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

        Only files with a digest are read; the caller has verified those. hnswlib believes what an
        index file says, so it is loaded only when its bytes are the ones that the digest names and
        all that is in it leads somewhere; otherwise the index is built again from the vectors.

        Raises:
            BundleError: texts or vectors have no digest, or do not fit together.
        """
        if not {TEXTS, VECTORS} <= digests.keys():
            raise BundleError(
                f"{folder}: it has no demonstrations: export it with --encoder and --examples"
            )
        demonstrations = read_examples(folder / TEXTS)
        vectors = load_file(folder / VECTORS).get("vectors", np.empty(0))
        if vectors.ndim != 2 or len(vectors) != len(demonstrations):
            raise BundleError(
                f"{folder}: {TEXTS} and {VECTORS} do not fit together: export the bundle again"
            )
        index = None
        if len(vectors) >= _EXACT_BELOW:
            shape = (len(vectors), vectors.shape[1])
            index = _load_index(folder / INDEX, digests.get(INDEX), shape)
        return cls(demonstrations, vectors, index)


def build_bank(
    demonstrations: Sequence[Demonstration], encoder: SentenceEncoder
) -> DemonstrationBank:
    """The bank of these demonstrations, with the encoder's vectors of their texts."""
    return DemonstrationBank(demonstrations, encoder.encode([d.text for d in demonstrations]))


def search_breadth(count: int, size: int) -> int:
    """Hnswlib's ef: how many elements a search for the `count` nearest of `size` keeps in view.

    It grows with the bank, or recall falls: the first three neighbours of real comments, with ef
    at 384, were found to 100 % among 20,000, 99.7 % among 40,000 and 98.3 % among a million. What
    a search keeps beyond the wanted ones makes these the right ones.
    """
    return max(count + count // 2, round(20 * math.pow(size, 0.25)))


def build_index(vectors: Vectors) -> hnswlib.Index:
    """An hnswlib cosine index of vectors [n, dim]; the same ones always give the same bytes."""
    index = hnswlib.Index(space="cosine", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=_LINKS, ef_construction=200, random_seed=42)
    index.add_items(vectors, np.arange(len(vectors)), num_threads=1)
    return index


def _load_index(path: Path, digest: str | None, shape: tuple[int, int]) -> hnswlib.Index | None:
    if digest is None or not path.exists():
        return None
    if file_sha256(path) != digest:
        return None
    if not is_sound(path, *shape, _LINKS):
        return None
    index = hnswlib.Index(space="cosine", dim=shape[1])
    index.load_index(str(path))
    return index


def read_examples(path: Path, labels: LabelSet | None = None) -> list[Demonstration]:
    """Read labelled examples: lines of {"text", "label"}, or dialogues with labelled utterances.

    With `labels`, each label becomes the set's own name for it. Utterances of a dialogue that
    are blank or have no label are passed over.

    Raises:
        InputError: a bad line, a label outside the set, or no example at all.
    """
    examples: list[Demonstration] = []
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            for text, label in _labelled_texts(orjson.loads(line)):
                name = label if labels is None else labels.canonical(label)
                if name is None:
                    assert labels is not None
                    raise InputError(
                        f"{where}: label {label!r} is not in the label set {labels.name}: "
                        f"choose from {', '.join(labels.labels)}"
                    )
                examples.append(Demonstration(text, name))
        except orjson.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error}): mend or remove the line") from error
        except RecordError as error:
            raise InputError(
                f'{where}: {error.reason}: write {{"text": "…", "label": "…"}}, or a dialogue'
            ) from error
    if not examples:
        raise InputError(f"{path}: no labelled example in it: give lines of text and label")
    return examples


def _labelled_texts(record: object) -> Iterator[tuple[str, str]]:
    if isinstance(record, dict) and "text" in record:
        text, label = record["text"], record.get("label")
        if not (isinstance(text, str) and text.strip() and isinstance(label, str)):
            raise RecordError("bad_example", "an example needs a `text` and a `label`")
        yield text, label
        return
    for utterance in parse_dialogue(record).utterances:
        if utterance.label is not None and not utterance.blank:
            yield utterance.text, utterance.label


def balance(
    demonstrations: Sequence[Demonstration], per_label: int, seed: int
) -> list[Demonstration]:
    """At most `per_label` demonstrations of each label, drawn at random; order is kept.

    The size of the rarest label balances the bank fully, as the paper does; a greater number
    keeps more of the frequent labels, which `nearest` balances among the results anyway.
    """
    random = np.random.default_rng(seed)
    indices: set[int] = set()
    for label in dict.fromkeys(d.label for d in demonstrations):
        members = [i for i, d in enumerate(demonstrations) if d.label == label]
        indices.update(int(i) for i in random.permutation(members)[:per_label])
    return [d for i, d in enumerate(demonstrations) if i in indices]


def text_key(text: str) -> str:
    """What makes two texts the same utterance: letters and digits, folded."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if c.isalnum()) or folded.strip()
