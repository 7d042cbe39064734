"""The benchmarks of the performance page, at tiny sizes, and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHAT
from helpers.commands import last_line, python

from benchmarks.lib.searches import Truth
from benchmarks.lib.sentences import converse, invent
from benchmarks.performance import write_page
from ercbatch.errors import UsageError
from ercbatch.retrieval.bank import Demonstration, DemonstrationBank, text_key


@pytest.fixture(scope="module")
def retrieval() -> dict[str, Any]:
    ask = ("--sizes", "200,2500", "--embedded", "400", "--queries", "30", "--rounds", "1")
    return last_line("benchmarks.retrieval", *ask)


@pytest.fixture(scope="module")
def latency() -> dict[str, Any]:
    return last_line("benchmarks.latency", "mini", CHAT, "--cold", "2", "--runs", "3")


@pytest.fixture(scope="module")
def scaling() -> dict[str, Any]:
    ask = ("--utterances", "20", "--lengths", "1,10,20", "--dialogues", "1,3", "--rounds", "1")
    return last_line("benchmarks.scaling", *ask)


def test_sentences_are_distinct_and_the_same_every_time() -> None:
    result = invent(2000)
    assert len({d.text for d in result}) == 2000
    assert result[:500] == invent(500) != invent(500, seed=1)
    assert len({d.label for d in result}) == 7
    dialogues = list(converse([d.text for d in result[:25]], 10))
    assert [len(d.utterances) for d in dialogues] == [10, 10, 5]
    assert [u.text for d in dialogues for u in d.utterances] == [d.text for d in result[:25]]


def test_recall_counts_what_the_bank_promises() -> None:
    """In rounds over the labels, without the text itself: an exact bank has all of it."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(300, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [str(label) for label in random.choice(list("abcd"), 300, p=[0.7, 0.2, 0.06, 0.04])]
    bank = DemonstrationBank(
        [Demonstration(str(i), label) for i, label in enumerate(labels)], vectors
    )
    truth = Truth(labels, vectors, vectors[:40], list(range(40)))
    for count in (1, 3, 5):
        own = [[str(i)] for i in range(40)]
        few = bank.nearest(vectors[:40], count, exclude=own)
        result = [[int(d.text) for d in each] for each in few]
        assert truth.recall(result, count) == 1.0
        # One wrong place for each query is one in `count` missed.
        worst = vectors[:40] @ vectors.T
        wrong = [[*each[:-1], int(row.argmin())] for each, row in zip(result, worst, strict=True)]
        assert truth.recall(wrong, count) == pytest.approx(1 - 1 / count)
        unbalanced = bank.nearest(vectors[:40], count)
        assert truth.recall([[int(d.text) for d in e] for e in unbalanced], count) < 1.0


def test_a_small_bank_is_exact_and_a_larger_one_nearly(retrieval: dict[str, Any]) -> None:
    assert retrieval["dim"] == 384
    small, large = retrieval["sizes"]["200"], retrieval["sizes"]["2500"]
    assert (small["embedded"], large["embedded"]) == (200, 400)
    for engine in ("ercbatch", "ercbatch, balanced", "exact"):
        for count in (1, 3, 5):
            assert small["engines"][engine][f"recall_at_{count}"] == 1.0
            assert large["engines"][engine][f"recall_at_{count}"] >= 0.95
    for result in (small, large):
        assert {"ercbatch, one label", "exact, alone"} <= result["engines"].keys()
        for own in result["engines"].values():
            assert own["queries_per_second"] > 0
            assert own["times_exact"] > 0
        assert result["engines"]["exact"]["times_exact"] == 1.0
    # Texts and vectors, and from 2,000 on an index that holds the vectors again.
    vectors = 4 * 384 / 1e6
    assert 200 * vectors < small["engines"]["ercbatch"]["disk_mb"] < 2 * 200 * vectors
    assert 2 * 2500 * vectors < large["engines"]["ercbatch"]["disk_mb"]


def test_the_first_label_takes_the_sum_of_its_steps(latency: dict[str, Any]) -> None:
    first, whole = latency["first_label_seconds"], latency["whole_command_seconds"]
    for spread in (first, whole, *latency["step_seconds"].values()):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert first["min"] < whole["min"]
    # The steps go another way to the same place: alike, whatever else the machine does.
    steps = sum(spread["median"] for spread in latency["step_seconds"].values())
    assert 0.3 < steps / first["median"] < 3
    assert latency["warm"].keys() == {"1", "5", "20"}
    assert all(0 < own["p50_ms"] <= own["p95_ms"] for own in latency["warm"].values())


def test_every_length_labels_the_same_utterances(scaling: dict[str, Any]) -> None:
    assert scaling["turns"].keys() == {"1", "10", "20"}
    assert {own["utterances"] for own in scaling["turns"].values()} == {20}
    assert [own["utterances"] for own in scaling["dialogues"].values()] == [10, 30]
    assert {"1", "2"} <= scaling["threads"].keys()
    for group in ("turns", "dialogues", "threads"):
        for own in scaling[group].values():
            assert own["ms_per_utterance"] > 0
            assert own["resident_mb"] > 50  # the bundle alone is most of that
    ten, twenty = (scaling["turns"][n]["ms_per_utterance"] for n in ("10", "20"))
    dear, cheap = max(ten, twenty), min(ten, twenty)
    assert scaling["spread"] == pytest.approx(dear / cheap - 1, abs=1e-3)
    assert scaling["two_threads_ratio"] > 0


def test_lengths_that_do_not_divide_the_utterances_are_refused() -> None:
    done = python("-m", "benchmarks.scaling", "--utterances", "20", "--lengths", "3")
    assert done.returncode == 2
    assert "20 utterances make no dialogues of 3 turns" in done.stderr


@pytest.fixture
def results(
    tmp_path: Path, retrieval: dict[str, Any], latency: dict[str, Any], scaling: dict[str, Any]
) -> Path:
    """A folder of saved lines: those above, and the others' in short."""
    engines = {
        "ercbatch": {"utterances_per_second": 400.5},
        "another": {"utterances_per_second": 30.25, "note": "one prompt each"},
    }
    operators = {"MatMul": {"nodes": 3, "seconds": 0.02}, "Add": {"nodes": 5, "seconds": 0.001}}
    profile = {"seconds": 0.022, "products_share": 0.95, "operators": operators}
    result = {
        "machine": last_line("benchmarks.machine"),
        "retrieval": retrieval,
        "latency": {"command": "python -m benchmarks.latency --cold 2", **latency},
        "scaling": scaling,
        "throughput": {"engines": engines, "threads": 2},
        "throughput-one-thread": {"engines": engines, "threads": 1},
        "packed": {"packed_per_second": 396.3, "separate_per_second": 73.0, "speed_ratio": 5.43},
        "graph": {
            **{"utterances": 76, "tokens": 1486, "packs": 6, "threads": 1},
            "graphs": {"mini": profile},
        },
        "limit": {"share_of_peak": 0.6},
    }
    folder = tmp_path / "results"
    folder.mkdir()
    for name, value in result.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.slow
def test_the_page_has_every_result_and_is_the_same_again(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "speed.md"
    written = last_line("benchmarks.performance", results, page)
    text = page.read_text()
    plots = {*re.findall(r"\]\(speed/(.+?)\)", text)}
    assert plots == set(written["plots"])
    assert {p.split(".")[0] for p in plots} == {
        *("throughput", "throughput-one-thread", "latency", "retrieval"),
        *("scaling", "packed", "graph"),
    }
    for name in plots:
        data = (page.with_suffix("") / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 1_000 < len(data) < 100_000
    titles = re.findall("^## (.+)$", text, re.MULTILINE)
    assert titles[:2] == ["Machine", "Throughput"]
    assert titles[-1] == "What was tried and did not pay"
    assert len(titles) == 9
    assert "### one thread" in text
    assert "$ python -m benchmarks.latency --cold 2\n" in text
    assert "| another | 30.25 | one prompt each |" in text
    assert "| share of peak | 0.6 |" in text
    assert "| MatMul | 3 | 20.00 |" in text
    for line in text.splitlines():  # every row of a table is as wide as its heading
        assert not line.startswith("|") or line.endswith("|")
    before = {path: path.read_bytes() for path in page.parent.rglob("*.*")}
    write_page(results, page)
    assert {path: path.read_bytes() for path in page.parent.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("latency", "{}", "latency.json: not what benchmarks.latency prints"),
        ("latency", "oops", "latency.json: not the JSON line of a benchmark"),
        ("latency", "[]", "latency.json: not the JSON line of a benchmark"),
        ("machine", None, "has no machine.json: write there what"),
    ],
)
def test_file_that_is_not_a_result_is_named(
    results: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    path = results / f"{name}.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        write_page(results, tmp_path / "page.md")


def test_texts_that_differ_in_case_alone_have_one_key() -> None:
    assert text_key("We won!") == text_key("we  WON...") != text_key("We lost.")
