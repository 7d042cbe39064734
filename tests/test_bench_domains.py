"""The written dialogues of train/data, and the measurement of domains beside baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT, EXAMPLES
from helpers.commands import python
from sklearn.metrics import cohen_kappa_score

from benchmarks.written import LABELS, PARTS, kappa, pairs, part, records, repeated_phrases


@pytest.fixture(scope="module")
def written() -> dict[str, list[Any]]:
    return {name: records(part(name)) for name in PARTS}


def test_written_dialogues_are_as_many_as_promised(written: dict[str, list[Any]]) -> None:
    result = [record for own in written.values() for record in own]
    assert len(result) >= 1_000
    assert sum(len(record["utterances"]) for record in result) >= 10_000
    assert len(written["held-out"]) >= 100
    assert len({record["id"] for record in result}) == len(result)
    assert len({record["about"].casefold() for record in result}) == len(result)


def test_written_labels_belong_to_the_set(written: dict[str, list[Any]]) -> None:
    for own in written.values():
        for record in own:
            for turn, (first, second) in zip(record["utterances"], pairs(record), strict=True):
                assert {first, second} <= set(LABELS.labels), record["id"]
                assert ("label" in turn) == (first == second), record["id"]
                assert turn["text"].strip(), record["id"]


def test_held_out_settings_are_in_no_other_part(written: dict[str, list[Any]]) -> None:
    held = {record["setting"] for record in written["held-out"]}
    assert held == {"classroom", "clinic", "delivery"}
    others = {r["setting"] for name in ("train", "valid") for r in written[name]}
    assert held.isdisjoint(others)


def test_written_dialogues_share_few_phrases(written: dict[str, list[Any]]) -> None:
    result = [record for own in written.values() for record in own]
    repeated = repeated_phrases(result)
    assert max(repeated.values()) < 0.005 * len(result)
    assert len(repeated) < 0.5 * len(result)


def test_kappa_equals_that_of_scikit_learn(written: dict[str, list[Any]]) -> None:
    labelled = [pair for record in written["valid"] for pair in pairs(record)]
    firsts, seconds = zip(*labelled, strict=True)
    assert kappa(labelled, LABELS) == pytest.approx(cohen_kappa_score(firsts, seconds))
    assert kappa(labelled, LABELS) > 0.85


def test_domains_are_measured_beside_baselines(bundle_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'base = "x"\n[[train]]\npath = "{CHAT}"\nlabels = "meld"\n')
    chat = EXAMPLES / "labelled_chat_valid.jsonl"
    done = python(
        *("-m", "benchmarks.domains", recipe, f"meld={chat}", "--plain", "--no-emoji"),
        *("--bundle", bundle_folder),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["system"].removeprefix(str(bundle_folder)) for row in rows] == [
        *("majority", "sentences", "", ", plain", ", no emoji"),
    ]
    said = [u for _, u in labelled_turns(chat)]
    most = max(said.count(label) for label in set(said))
    assert {row["utterances"] for row in rows} == {len(said)}
    assert max(rows[0]["recall"].values()) == 1
    assert rows[0]["weighted_f1"] == pytest.approx(
        most / len(said) * 2 * most / (len(said) + most), abs=1e-3
    )
    assert rows[2] == {**rows[4], "system": rows[2]["system"]}  # the chat has no emoji


def labelled_turns(path: Path) -> list[tuple[str, str]]:
    turns = [u for line in path.read_text().splitlines() for u in json.loads(line)["utterances"]]
    return [(turn["text"], turn["label"]) for turn in turns if "label" in turn]


def test_calibration_is_measured_on_other_dialogues(bundle_folder: Path) -> None:
    chats = EXAMPLES / "labelled_chat.jsonl"
    done = python(
        *("-m", "benchmarks.calibration", f"meld={chats}", "--bundle", bundle_folder),
        *("--utterances", "5", "--draws", "2"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["before"].keys() == result["after"].keys()
    assert 0 < result["after"]["calibration_error"][0] < 1
    # A temperature moves no label; how common labels are does.
    assert result["after"]["weighted_f1"] == result["before"]["weighted_f1"]
    shifted = python(
        *("-m", "benchmarks.calibration", f"meld={chats}", "--bundle", bundle_folder),
        *("--utterances", "20", "--draws", "2", "--label-shift"),
    )
    assert shifted.returncode == 0, shifted.stderr
    moved = json.loads(shifted.stdout.splitlines()[-1])
    assert moved["after"]["weighted_f1"] != moved["before"]["weighted_f1"]
    done = python(
        *("-m", "benchmarks.calibration", f"meld={chats}", "--bundle", bundle_folder),
        *("--utterances", "100000"),
    )
    assert done.returncode == 2
    assert "over half of the dialogues" in done.stderr
