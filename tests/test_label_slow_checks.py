"""Short forms of the slow checks behind docs/reliability.md (`tests/slow/reliability.sh`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CHAT
from helpers.commands import last_line


@pytest.mark.slow
def test_a_long_run_accounts_for_every_line(bundle_folder: Path, tmp_path: Path) -> None:
    result = last_line(
        *("benchmarks.soak", tmp_path, "--dialogues", "4000"),
        *("--bundle", bundle_folder, "--kills", "1", "--after", "0.5"),
    )
    assert result["all_accounted_for"]
    assert result["counts"] == {"lines": 4044, "labelled": 4000, "rejected": 4, "blank": 40}
    assert result["kills"] == 1
    assert 0 < result["most_seconds_lost"] < 5


def test_no_mutant_of_a_bundle_crashes(bundle_folder: Path) -> None:
    result = last_line("tests.slow.mutants", "40", "--bundle", bundle_folder)
    assert (result["mutants"], result["failed"]) == (40, 0)
    assert result["befallen, refused"] == 20
    assert result["written, refused"] + result["written, labelled"] == 20


@pytest.mark.parametrize(
    ("kind", "much"), [("utterances", 300), ("records", 2), ("journal", 2), ("manifest", 2)]
)
def test_nothing_that_is_read_raises(kind: str, much: int) -> None:
    result = last_line("tests.slow.fuzz", kind, str(much))
    assert result["kind"] == kind
    assert result["inputs"] > 10


def test_hostile_lines_are_held_against_harmless_ones(bundle_folder: Path) -> None:
    result = last_line("benchmarks.persuasion", CHAT, "--bundle", bundle_folder)
    lines = result["lines"]
    assert lines.pop("all")["neighbours"] == sum(line["neighbours"] for line in lines.values()) > 0
    for line in lines.values():
        for moved in ("moved", "to_label"):
            shares = line[f"hostile_{moved}"], line[f"harmless_{moved}"]
            assert shares[0] - shares[1] == pytest.approx(line[f"{moved}_beyond"], abs=1e-3)
            assert 0 <= min(shares) <= max(shares) <= 1
