"""The demonstration bank: search, balance, files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import python
from hypothesis import given, settings
from hypothesis import strategies as st

from ercbatch.errors import BundleError, InputError
from ercbatch.labels import LabelSet, label_set
from ercbatch.retrieval.bank import (
    INDEX,
    TEXTS,
    VECTORS,
    Demonstration,
    DemonstrationBank,
    balance,
    build_bank,
    read_examples,
    rebuild_index,
    search_breadth,
)
from ercbatch.retrieval.encoder import SentenceEncoder
from ercbatch.retrieval.hnsw_file import is_sound

Vectors = npt.NDArray[np.float32]


def unit(vectors: npt.NDArray[np.float64]) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / lengths, dtype=np.float32)


def texts(found: tuple[Demonstration, ...]) -> list[str]:
    return [d.text for d in found]


def rounds(
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


banks = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"), st.sampled_from(["joy", "fear", "anger"]), st.integers(0, 7)
    ),
    max_size=14,
)


@settings(deadline=None)
@given(banks, st.integers(0, 7), st.integers(0, 8), st.sampled_from("abcdefgh"))
def test_results_come_in_rounds_over_the_labels(
    entries: list[tuple[str, str, int]], query: int, count: int, banned: str
) -> None:
    """Few directions and few texts: ties and excluded texts in every bank."""
    directions = unit(np.random.default_rng(0).normal(size=(8, 5)))
    demonstrations = [Demonstration(text, label) for text, label, _ in entries]
    vectors = directions[[direction for *_, direction in entries]].reshape(-1, 5)
    found = DemonstrationBank(demonstrations, vectors).nearest(
        directions[[query]], count, exclude=[[banned]]
    )[0]
    similarity = np.array([(directions[query] * v).sum() for v in vectors], np.float32)
    wanted = rounds(demonstrations, similarity, count, banned)
    assert list(found) == wanted
    assert banned not in texts(found)
    labels = {d.label for d in demonstrations if d.text != banned}
    assert len({d.label for d in found}) == min(len(labels), count)


@settings(deadline=None)
@given(banks, st.lists(st.integers(0, 7), min_size=2, max_size=4), st.integers(1, 5))
def test_a_result_does_not_depend_on_the_other_queries(
    entries: list[tuple[str, str, int]], queries: list[int], count: int
) -> None:
    directions = unit(np.random.default_rng(1).normal(size=(8, 5)))
    bank = DemonstrationBank(
        [Demonstration(text, label) for text, label, _ in entries],
        directions[[direction for *_, direction in entries]].reshape(-1, 5),
    )
    together = bank.nearest(directions[queries], count)
    assert together == [bank.nearest(directions[[q]], count)[0] for q in queries]


def test_equal_vectors_rank_by_place() -> None:
    """A BLAS product rounds equal rows differently by where they stand; this bank has 1,001."""
    vectors = np.tile(unit(np.random.default_rng(0).normal(size=(1, 384))), (1001, 1))
    bank = DemonstrationBank([Demonstration(str(i), "joy") for i in range(1001)], vectors)
    query = unit(np.random.default_rng(1).normal(size=(1, 384)))
    assert texts(bank.nearest(query, 6)[0]) == ["0", "1", "2", "3", "4", "5"]


def test_the_utterance_itself_is_never_shown() -> None:
    """Nor the same words in other case, punctuation or spacing."""
    demonstrations = [
        Demonstration(text, "joy") for text in ("We won!", "we  won", "WE WON...", "We lost.")
    ]
    bank = DemonstrationBank(demonstrations, np.eye(4, dtype=np.float32))
    assert texts(bank.nearest(np.eye(4, dtype=np.float32)[:1], 3, exclude=[["We won"]])[0]) == [
        "We lost."
    ]


def test_training_can_ask_for_the_gold_label_only() -> None:
    demonstrations = [Demonstration(str(i), "joy" if i % 2 else "fear") for i in range(6)]
    bank = DemonstrationBank(demonstrations, np.eye(6, dtype=np.float32))
    query = np.eye(6, dtype=np.float32)[[1, 1, 1]]
    found = bank.nearest(query, 2, labels=["joy", "fear", "anger"], exclude=[["1"]] * 3)
    assert [texts(f) for f in found] == [["3", "5"], ["0", "2"], []]


# Large banks


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


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_large_bank_finds_what_exact_search_finds(
    large: tuple[list[Demonstration], Vectors], large_bank: DemonstrationBank
) -> None:
    demonstrations, vectors = large
    queries = unit(np.random.default_rng(4).normal(size=(100, 48)))
    same = 0
    for query, found in zip(queries, large_bank.nearest(queries, 3), strict=True):
        wanted = rounds(demonstrations, vectors @ query, 3, "")
        same += len(set(found) & set(wanted))
    assert same / 300 >= 0.95


def test_rare_labels_of_a_large_bank_are_not_missed(large_bank: DemonstrationBank) -> None:
    """They are seldom among the index's candidates: then the search is exact."""
    queries = unit(np.random.default_rng(5).normal(size=(10, 48)))
    for found in large_bank.nearest(queries, 7):
        assert {d.label for d in found} == set("abcdefg")


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
    found = bank.nearest(directions, 8)
    assert [len(f) for f in found] == [8] * 30


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
        rebuild_index(large[1][::-1]).save_index(str(index))
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
    rebuild_index(vectors).save_index(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Files and label sets


def small_bank() -> DemonstrationBank:
    labels = ["joy", "anger", "Neutral", "surprise", "peaceful"]
    return DemonstrationBank(
        [Demonstration(f"„{label}“\u2028 text", label) for label in labels],
        np.eye(5, dtype=np.float32),
    )


def test_a_small_bank_comes_back_and_has_no_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b"left from another bank")
    bank = small_bank()
    bank.save(tmp_path)
    assert set(digests(tmp_path)) == {TEXTS, VECTORS}
    loaded = DemonstrationBank.load(tmp_path, digests(tmp_path))
    assert loaded.demonstrations == bank.demonstrations
    assert np.array_equal(loaded.vectors, bank.vectors)


def test_texts_without_their_vectors_are_refused(tmp_path: Path) -> None:
    small_bank().save(tmp_path)
    lines = (tmp_path / TEXTS).read_bytes().splitlines(keepends=True)
    (tmp_path / TEXTS).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(BundleError, match="do not fit together"):
        DemonstrationBank.load(tmp_path, digests(tmp_path))
    with pytest.raises(BundleError, match="it has no demonstrations"):
        DemonstrationBank.load(tmp_path, {TEXTS: digests(tmp_path)[TEXTS]})


def test_another_label_set_renames_and_leaves_out() -> None:
    bank = small_bank().restricted(label_set("meld"))
    assert [d.label for d in bank.demonstrations] == ["joyful", "angry", "neutral", "surprise"]
    assert bank.nearest(np.eye(5, dtype=np.float32)[[1]], 1)[0][0].label == "angry"
    assert bank.restricted(label_set("meld")) is bank
    nothing = small_bank().restricted(LabelSet("moods", ("up", "down")))
    assert nothing.nearest(np.eye(5, dtype=np.float32), 3) == [()] * 5


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


def test_balance_draws_the_same_few_of_each_label() -> None:
    examples = [Demonstration(str(i), "joy" if i % 5 else "fear") for i in range(50)]
    kept = balance(examples, 8, seed=42)
    assert [d.label for d in kept].count("joy") == [d.label for d in kept].count("fear") == 8
    assert kept == balance(examples, 8, seed=42) != balance(examples, 8, seed=43)
    assert kept == sorted(kept, key=lambda d: int(d.text))
    assert balance(examples, 100, seed=42) == examples


def test_a_bank_of_examples_finds_the_like(encoder_folder: Path) -> None:
    encoder = SentenceEncoder(
        encoder_folder / "encoder.onnx", encoder_folder / "encoder_tokenizer.json"
    )
    lines = ["the train is late again", "yes please", "my parcel was lost", "oh no"]
    bank = build_bank([Demonstration(line, "neutral") for line in lines], encoder)
    queries = encoder.encode(lines)
    assert [texts(f) for f in bank.nearest(queries, 1)] == [[line] for line in lines]
    assert not any(
        line in texts(f)
        for line, f in zip(
            lines, bank.nearest(queries, 3, exclude=[[line] for line in lines]), strict=True
        )
    )


# Reading examples


def examples_file(folder: Path, *lines: object) -> Path:
    path = folder / "examples.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )
    return path


def test_examples_are_lines_or_labelled_dialogues(tmp_path: Path) -> None:
    path = examples_file(
        tmp_path,
        '\ufeff{"text": "We won!", "label": "JOY"}',
        "",
        {
            "utterances": [
                {"speaker": "Ana", "text": "Where is it?"},
                {"speaker": "Bo", "text": "Gone.", "label": "sadness"},
                {"speaker": "Bo", "text": "  ", "label": "neutral"},
            ]
        },
        {"messages": [{"role": "user", "content": "Again?!", "label": "mad"}]},
    )
    assert read_examples(path, label_set("meld")) == [
        Demonstration("We won!", "joyful"),
        Demonstration("Gone.", "sad"),
        Demonstration("Again?!", "angry"),
    ]
    assert [d.label for d in read_examples(path)] == ["JOY", "sadness", "mad"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x", "label"', "line 2: not JSON .*mend or remove"),
        ("[1]", "line 2: the line is not a JSON object: write"),
        ({"text": "x"}, "line 2: an example needs a `text` and a `label`: write"),
        ({"text": " ", "label": "joy"}, "line 2: an example needs"),
        ({"text": 3, "label": "joy"}, "line 2: an example needs"),
        ({"utterances": [{"text": None}]}, "line 2: `text` of utterances 1 is not"),
        ({"text": "x", "label": "smug"}, "line 2: label 'smug' is not in .* meld: choose from neu"),
    ],
)
def test_a_bad_example_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = examples_file(tmp_path, {"text": "We won!", "label": "joy"}, line)
    with pytest.raises(InputError, match=message) as caught:
        read_examples(path, label_set("meld"))
    assert str(caught.value).startswith(str(path))


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    path = examples_file(tmp_path, {"utterances": [{"text": "Where is it?"}]})
    with pytest.raises(InputError, match="no labelled example"):
        read_examples(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_examples(tmp_path / "none.jsonl")
