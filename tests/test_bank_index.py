"""Large demonstration banks: their index, and searches in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import python
from helpers.vectors import Vectors, digests, expected_neighbours, unit

from ercbatch.labels import LabelSet
from ercbatch.retrieval.bank import (
    INDEX,
    TEXTS,
    VECTORS,
    Demonstration,
    DemonstrationBank,
    build_index,
    search_breadth,
)
from ercbatch.retrieval.hnsw_file import is_sound


@pytest.fixture(scope="module")
def large() -> tuple[list[Demonstration], Vectors]:
    """3,000 random vectors; two labels are rare."""
    random = np.random.default_rng(3)
    labels = random.choice(list("abcdefg"), 3000, p=[0.5, 0.2, 0.15, 0.1, 0.048, 0.001, 0.001])
    return (
        [Demonstration(f"text {i}", str(label)) for i, label in enumerate(labels)],
        unit(random.normal(size=(3000, 48))),
    )


@pytest.fixture(scope="module")
def large_bank(large: tuple[list[Demonstration], Vectors]) -> DemonstrationBank:
    return DemonstrationBank(*large)


def test_a_large_bank_finds_what_exact_search_finds(
    large: tuple[list[Demonstration], Vectors], large_bank: DemonstrationBank
) -> None:
    demonstrations, vectors = large
    queries = unit(np.random.default_rng(4).normal(size=(100, 48)))
    same = 0
    for query, result in zip(queries, large_bank.nearest(queries, 3), strict=True):
        wanted = expected_neighbours(demonstrations, vectors @ query, 3, "")
        same += len(set(result) & set(wanted))
    assert same / 300 >= 0.95


def test_rare_labels_of_a_large_bank_are_not_missed(large_bank: DemonstrationBank) -> None:
    """They are seldom among the index's candidates: then the search is exact."""
    queries = unit(np.random.default_rng(5).normal(size=(10, 48)))
    for result in large_bank.nearest(queries, 7):
        assert {d.label for d in result} == set("abcdefg")


def test_a_search_is_broader_in_a_larger_bank() -> None:
    """With the breadth of 40,000 vectors, recall@3 among a million is below 98.3 %."""
    for wanted in (32, 96, 256, 768):
        breadths = [search_breadth(wanted, size) for size in (2_000, 40_000, 1_000_000)]
        assert breadths == sorted(breadths)
        assert breadths[0] >= wanted  # hnswlib finds no more than it keeps in view
    assert search_breadth(32, 1_000_000) > 2 * search_breadth(32, 40_000)


def test_an_index_in_islands_falls_back_to_exact_search() -> None:
    """Thousands of equal vectors: hnswlib then finds too few and raises."""
    random = np.random.default_rng(1)
    directions = unit(random.normal(size=(30, 32)))
    places = random.integers(0, 30, 10_000)
    bank = DemonstrationBank(
        [Demonstration(str(i), "abc"[i % 3]) for i in range(10_000)], directions[places]
    )
    result = bank.nearest(directions, 8)
    assert [len(f) for f in result] == [8] * 30


def test_the_same_bank_gives_the_same_index_bytes(
    large: tuple[list[Demonstration], Vectors], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        DemonstrationBank(*large).save(tmp_path / name)
    assert set(digests(tmp_path / "one")) == {TEXTS, VECTORS, INDEX}
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("damage", ["none", "garbage", "other", "missing", "no digest"])
def test_only_the_index_that_the_digest_names_is_loaded(
    large: tuple[list[Demonstration], Vectors],
    large_bank: DemonstrationBank,
    tmp_path: Path,
    damage: str,
) -> None:
    """Hnswlib trusts an index file: an altered one is never loaded, but built again."""
    large_bank.save(tmp_path)
    known = digests(tmp_path)
    index = tmp_path / INDEX
    if damage == "garbage":
        index.write_bytes(b"\xff" * index.stat().st_size)
    elif damage == "other":  # whole, but of other vectors: loaded, it would find other texts
        build_index(large[1][::-1]).save_index(str(index))
    elif damage == "missing":
        index.unlink()
    elif damage == "no digest":
        del known[INDEX]
        index.write_bytes(b"\xff" * 100)
    loaded = DemonstrationBank.load(tmp_path, known)
    queries = unit(np.random.default_rng(6).normal(size=(20, 48)))
    assert loaded.nearest(queries, 3) == large_bank.nearest(queries, 3)
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert digests(tmp_path / "again")[INDEX] == rebuilt_digest(large[1], tmp_path)


def test_an_index_that_leads_nowhere_is_not_followed(
    large: tuple[list[Demonstration], Vectors], large_bank: DemonstrationBank, tmp_path: Path
) -> None:
    """Whatever is altered in it, its digest fits: a bundle's author writes that too."""
    large_bank.save(tmp_path)
    index, (count, dim) = tmp_path / INDEX, large[1].shape
    whole = index.read_bytes()
    assert is_sound(index, count, dim, 16)
    element, random = (len(whole) - 96) // count, np.random.default_rng(3)
    links = 4 * 33  # of an element's lowest level, with their number
    places = [
        *range(0, 96),
        *(96 + int(i) * element // 4 * 4 for i in random.integers(0, count, 40)),
        *(96 + int(i) * (links + 4 * dim + 8) + int(random.integers(links)) for i in range(200)),
        *(len(whole) - int(i) for i in random.integers(1, 4000, 200)),
    ]
    sound = []
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 0xFF
        index.write_bytes(altered)
        if is_sound(index, count, dim, 16):
            sound.append(bytes(altered))
    assert len(sound) < len(places) // 2  # what is not read, an unused link say, may be anything
    for data in (whole[:50], whole[:-1], whole + b"x", b""):
        index.write_bytes(data)
        assert not is_sound(index, count, dim, 16)
    for number, data in enumerate(sound):
        (tmp_path / f"{number}.hnsw").write_bytes(data)
    np.save(tmp_path / "queries.npy", large[1][:50])
    done = python(
        "-c",
        "import sys, hnswlib, numpy\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n"
        "queries = numpy.load(folder / 'queries.npy')\n"
        "for path in folder.glob('[0-9]*.hnsw'):\n"
        "    index = hnswlib.Index('cosine', queries.shape[1])\n"
        "    index.load_index(str(path))\n"
        "    assert (index.knn_query(queries, k=5)[0] < index.get_current_count()).all()\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def rebuilt_digest(vectors: Vectors, folder: Path) -> str:
    path = folder / "rebuilt"
    build_index(vectors).save_index(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_bank_under_another_label_set(
    large: tuple[list[Demonstration], Vectors], large_bank: DemonstrationBank
) -> None:
    queries = unit(np.random.default_rng(7).normal(size=(5, 48)))
    renamed = large_bank.restricted(LabelSet("letters", tuple("ABCDEFG"))).nearest(queries, 3)
    assert [[Demonstration(d.text, d.label.lower()) for d in few] for few in renamed] == [
        list(few) for few in large_bank.nearest(queries, 3)
    ]
    rest = [i for i, d in enumerate(large[0]) if d.label != "a"]
    alone = DemonstrationBank([large[0][i] for i in rest], large[1][rest])
    fewer = large_bank.restricted(LabelSet("most letters", tuple("bcdefg")))
    assert fewer.nearest(queries, 3) == alone.nearest(queries, 3)
