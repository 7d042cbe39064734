"""A label does not depend on what else is labelled; int8 included."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAT, edit_manifest
from helpers.commands import python
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.neighbours import THREADS, Company, Comparison
from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.labeler import Labeler
from ercbatch.scoring.sessions import LONGEST_PACK

WORDS = "it is gone thank you where my door late again happy fridge no !".split()
COUNT = 24


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    draw = random.Random(5)
    return [
        Dialogue(
            tuple(
                Utterance(" ".join(draw.choices(WORDS, k=draw.randrange(12))), draw.choice("AB"))
                for _ in range(draw.randint(1, 9))
            )
        )
        for _ in range(COUNT)
    ]


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "demonstrations"])
def company(
    request: pytest.FixtureRequest, bundle_folder: Path, dialogues: list[Dialogue]
) -> Company:
    labelers = [
        Labeler(str(bundle_folder), demonstrations=request.param, threads=n) for n in THREADS
    ]
    return Company(labelers, dialogues)


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(range(COUNT)),
    count=st.integers(1, COUNT),
    tokens=st.integers(1, LONGEST_PACK),
    labeler=st.integers(0, len(THREADS) - 1),
)
def test_probabilities_are_those_of_the_dialogue_alone(
    company: Company, order: list[int], count: int, tokens: int, labeler: int
) -> None:
    result = Comparison()
    company.compare(result, order[:count], tokens, labeler)
    assert result.other_labels == 0
    assert result.largest_difference < 1e-6


def test_dialogues_share_no_longer_packs(bundle_folder: Path, tmp_path: Path) -> None:
    """In longer ones a sum runs in another order, which moves int8 activations by whole steps."""
    folder = shutil.copytree(bundle_folder, tmp_path / "long")
    edit_manifest(folder, lambda value: value.update(pack_tokens=4096))
    assert Labeler(str(folder)).engine.longest_pack == LONGEST_PACK


def test_what_differs_is_counted() -> None:
    result = Comparison()
    result.add(
        {0: np.array([0.4, 0.6]), 3: np.array([0.5, 0.5])},
        {0: np.array([0.75, 0.25]), 3: np.array([0.5, 0.5])},
    )
    assert astuple(result) == (2, 1, 1, pytest.approx(0.35))


def test_the_command_says_what_it_compared(bundle_folder: Path) -> None:
    done = python(
        *("-m", "benchmarks.neighbours", CHAT, "--bundle", bundle_folder),
        *("--trials", "3", "--demos", "1"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["trials"] == 3
    assert metrics["utterances_compared"] >= 6
    assert metrics["other_labels"] == 0
