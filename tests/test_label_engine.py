"""The engine: threads and resuming change neither order, errors nor numbers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAT

from ercbatch import Labeler
from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.engine import in_order
from ercbatch.inputs.records import read_dialogues
from ercbatch.scoring.threads import available_threads


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_come_in_order(threads: int) -> None:
    def act(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(in_order(act, range(40), threads)) == [n * n for n in range(40)]
    assert list(in_order(act, [], threads)) == []


@pytest.mark.parametrize(("outer", "inner"), [("max", "max"), ("50000", "max"), ("max", "50000")])
def test_threads_are_those_of_the_cgroups(tmp_path: Path, outer: str, inner: str) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "own").write_text("12:cpu:/old\n0::/a/b\n")
    (tmp_path / "a" / "cpu.max").write_text(f"{outer} 50000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text(f"{inner} 50000\n")
    free = available_threads(tmp_path / "none", tmp_path / "none")
    expected = free if outer == inner else 1
    assert available_threads(tmp_path, tmp_path / "own") == expected


def test_the_thread_that_handles_signals_computes_nothing() -> None:
    def act(_: int) -> bool:
        return threading.current_thread() is threading.main_thread()

    assert list(in_order(act, range(3), 1)) == [False] * 3


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_in_its_place(threads: int) -> None:
    def act(number: int) -> int:
        if number == 5:
            raise ValueError("five")
        return number

    results = in_order(act, range(40), threads)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)


def test_no_more_is_taken_than_threads_can_use() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = in_order(lambda number: number, source(), 3)
    assert next(results) == 0
    results.close()
    assert len(taken) <= 5
    assert not [t for t in threading.enumerate() if t.name.startswith("ercbatch-score")]


@pytest.mark.parametrize("demonstrations", [0, 1])
def test_what_fills_no_pack_does_not_wait_for_the_end(
    bundle_folder: Path, demonstrations: int
) -> None:
    labeler = Labeler(str(bundle_folder), demonstrations=demonstrations)
    taken: list[int] = []

    def items(rest: Dialogue | None) -> Iterator[tuple[int, Dialogue | None]]:
        yield 0, Dialogue((Utterance("it is gone"),))
        for number in range(1, 100_000):
            taken.append(number)
            yield number, rest

    for rest, most in ((None, 5000), (Dialogue((Utterance(""),), size=3 << 20), 40)):
        taken.clear()
        results = labeler.label_items(items(rest))
        assert next(results)[0].origin == 0
        results.close()
        assert len(taken) < most


@pytest.mark.slow
@pytest.mark.parametrize("demonstrations", [0, 1])
def test_resuming_after_any_item_changes_no_number(
    bundle_folder: Path, demonstrations: int
) -> None:
    labeler = Labeler(str(bundle_folder), demonstrations=demonstrations, scores=True)
    draw = random.Random(1)

    def item(number: int) -> Dialogue | None:
        if number % 700 > 200 and draw.random() < 0.99:  # more than wait for one pack
            return None
        turns = draw.choice((1, 2, 9, 30))
        words = "it is gone thank you where".split()
        return Dialogue(
            tuple(
                Utterance(" ".join(draw.choices(words, k=draw.randrange(9)))) for _ in range(turns)
            )
        )

    given = [(number, item(number)) for number in range(1400)]
    whole = list(labeler.label_items(given))
    assert [entry.origin for entry, _ in whole] == list(range(1400))
    for done in (0, 150, 199, 255, 256, 400, 690, 850, 1399):
        last = whole[done][0]
        rest = labeler.label_items(given[last.first_in_chunk :], last.index + 1)
        assert [(e.origin, d) for e, d in rest] == [(e.origin, d) for e, d in whole[done + 1 :]]


@pytest.mark.slow
def test_the_number_of_threads_changes_no_number() -> None:
    dialogues = [dialogue for _, dialogue in read_dialogues(Path(CHAT))] * 12
    result = []
    for threads in (1, 2, 5):
        labeler = Labeler("mini", threads=threads, demonstrations=0)
        assert labeler.engine.scorer.parallel_packs == threads
        rows = [entry.rows for entry in labeler.engine.run((None, d) for d in dialogues)]
        result.append(np.array([p for some in rows for p in some.values()]))
    assert len(result[0]) == sum(len(d.utterances) for d in dialogues)
    assert np.array_equal(result[0], result[1])
    assert np.array_equal(result[0], result[2])
