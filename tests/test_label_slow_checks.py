"""Short forms of the slow checks behind docs/reliability.md (`tests/slow/reliability.sh`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CHAT
from helpers.commands import last_line


@pytest.mark.slow
def test_a_long_run_accounts_for_every_line(bundle_folder: Path, tmp_path: Path) -> None:
    found = last_line(
        *("benchmarks.soak", tmp_path, "--dialogues", "4000"),
        *("--bundle", bundle_folder, "--kills", "1", "--after", "0.5"),
    )
    assert found["all_accounted_for"]
    assert found["counts"] == {"lines": 4044, "labelled": 4000, "rejected": 4, "blank": 40}
    assert found["kills"] == 1
    assert 0 < found["most_seconds_lost"] < 5


def test_no_mutant_of_a_bundle_crashes(bundle_folder: Path) -> None:
    found = last_line("tests.slow.mutants", "40", "--bundle", bundle_folder)
    assert (found["mutants"], found["failed"]) == (40, 0)
    assert found["befallen, refused"] == 20
    assert found["written, refused"] + found["written, labelled"] == 20


@pytest.mark.parametrize(
    ("kind", "much"), [("utterances", 300), ("records", 2), ("journal", 2), ("manifest", 2)]
)
def test_nothing_that_is_read_raises(kind: str, much: int) -> None:
    found = last_line("tests.slow.fuzz", kind, str(much))
    assert found["kind"] == kind
    assert found["inputs"] > 10


def test_hostile_lines_are_held_against_harmless_ones(bundle_folder: Path) -> None:
    found = last_line("benchmarks.persuasion", CHAT, "--bundle", bundle_folder)
    lines = found["lines"]
    assert lines.pop("all")["neighbours"] == sum(line["neighbours"] for line in lines.values()) > 0
    for line in lines.values():
        for moved in ("moved", "to_label"):
            shares = line[f"hostile_{moved}"], line[f"harmless_{moved}"]
            assert shares[0] - shares[1] == pytest.approx(line[f"{moved}_beyond"], abs=1e-3)
            assert 0 <= min(shares) <= max(shares) <= 1
