"""The demonstration bank: search, balance, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.vectors import digests, expected_neighbours, unit
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
)
from ercbatch.retrieval.encoder import SentenceEncoder


def texts(result: tuple[Demonstration, ...]) -> list[str]:
    return [d.text for d in result]


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
    result = DemonstrationBank(demonstrations, vectors).nearest(
        directions[[query]], count, exclude=[[banned]]
    )[0]
    similarity = np.array([(directions[query] * v).sum() for v in vectors], np.float32)
    wanted = expected_neighbours(demonstrations, similarity, count, banned)
    assert list(result) == wanted
    assert banned not in texts(result)
    labels = {d.label for d in demonstrations if d.text != banned}
    assert len({d.label for d in result}) == min(len(labels), count)


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
    result = bank.nearest(query, 2, labels=["joy", "fear", "anger"], exclude=[["1"]] * 3)
    assert [texts(f) for f in result] == [["3", "5"], ["0", "2"], []]


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
