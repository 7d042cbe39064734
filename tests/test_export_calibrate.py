"""`python -m export calibrate`: a bundle is fitted to labelled dialogues and measured on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import CHAT, EXAMPLES, cli
from helpers.commands import python

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import find_bundle, read_info
from ercbatch.bundle.manifest import BundleInfo
from export.__main__ import main

pytestmark = pytest.mark.transformers

VALID = EXAMPLES / "labelled_chat_valid.jsonl"


def calibrate(bundle: Path | str, out: Path, *options: str) -> tuple[BundleInfo, str]:
    """The description of the calibrated bundle, and stderr."""
    done = python("-m", "export", "calibrate", bundle, "-o", out, *options)
    assert done.returncode == 0, done.stderr
    return read_info(out), done.stderr


@pytest.fixture(scope="module")
def mine(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, calibrated on one file."""
    out = tmp_path_factory.mktemp("calibrated") / "mine"
    calibrate(bundle_folder, out, "--valid", f"meld={VALID}", "--name", "mine")
    return out


def test_only_temperatures_and_metrics_change(bundle_folder: Path, mine: Path) -> None:
    before, after = read_info(bundle_folder), read_info(mine)
    assert after.name == "mine"
    assert after.files[manifest.MODEL] == before.files[manifest.MODEL]
    assert after.calibration["meld"].utterances == 22
    assert after.temperatures["meld"] == after.calibration["meld"].temperature
    assert [(q.title, q.utterances) for q in after.quality] == [("meld, labelled_chat_valid", 22)]
    assert cli("bundle", "verify", mine).returncode == 0


def test_new_metrics_of_a_label_set_replace_all_its_old_ones(mine: Path, tmp_path: Path) -> None:
    both = ("--valid", f"meld={VALID}", "--valid", f"meld={CHAT}")
    info, _ = calibrate(mine, tmp_path / "both", *both)
    assert sorted(quality.title for quality in info.quality) == [
        "meld, labelled_chat",
        "meld, labelled_chat_valid",
    ]


def test_dialogues_that_are_only_measured_change_no_temperature(
    bundle_folder: Path, mine: Path, tmp_path: Path
) -> None:
    options = ("--valid", f"meld={VALID}", "--measure", f"meld={CHAT}")
    info, _ = calibrate(bundle_folder, tmp_path / "aside", *options)
    assert info.temperatures == read_info(mine).temperatures
    weights = {quality.title: quality.calibration_weight for quality in info.quality}
    assert weights == {"meld, labelled_chat_valid": 1.0, "meld, labelled_chat": 0.0}
    assert all(quality.metrics()["calibration_error"] > 0 for quality in info.quality)


def test_label_shift_follows_how_common_labels_are(
    bundle_folder: Path, mine: Path, tmp_path: Path
) -> None:
    sad = tmp_path / "sad.jsonl"
    turn = {"text": "I miss the old flat.", "label": "sad"}
    records = ({"id": number, "utterances": [turn] * 6} for number in range(9))
    sad.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    shifted = tmp_path / "shifted"
    info, _ = calibrate(bundle_folder, shifted, "--valid", f"meld={sad}", "--label-shift")
    offsets = info.label_offsets["meld"]
    assert max(offsets, key=lambda label: offsets[label]) == "sad"
    assert f"sad {offsets['sad']:+.2f}" in (shifted / manifest.CARD).read_text()
    before, after = (
        cli("label", sad, "--bundle", folder, "--quiet").stdout.count('"emotion":"sad"')
        for folder in (bundle_folder, shifted)
    )
    assert before < after
    # Calibrating without it takes the offsets away again.
    info, _ = calibrate(shifted, tmp_path / "again", "--valid", f"meld={VALID}")
    assert info.label_offsets == {}
    assert info.temperatures == read_info(mine).temperatures


def test_label_shift_that_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    info, stderr = calibrate("mini", tmp_path / "few", "--valid", f"meld={VALID}", "--label-shift")
    assert "warning: meld: no label shift was kept" in stderr
    assert info.label_offsets == {}


def test_another_window_discards_metrics_of_the_old_one(tmp_path: Path) -> None:
    options = ("--turns", "3", "--stride", "2", "--valid", f"meld={VALID}")
    after, _ = calibrate("mini", tmp_path / "moved", *options)
    before = read_info(find_bundle("mini"))
    assert after.window == replace(before.window, turns=3, stride=2)
    assert after.temperatures.keys() == before.temperatures.keys()
    assert [quality.title for quality in after.quality] == ["meld, labelled_chat_valid"]
    assert list(after.calibration) == ["meld"]


def test_unusable_dialogues_are_refused(bundle_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"utterances": [{"text": "oh", "label": "sleepy"}]}\n')
    for valid, code, words in (
        ("meld", 2, "give it as SET=FILE"),
        ("meld=nothing.jsonl", 2, "there is no file nothing.jsonl"),
        (f"meld={other}", 4, "line 1: label 'sleepy' is not in the label set meld"),
        (f"emorynlp={VALID}", 2, "has no label set 'emorynlp': choose from meld"),
    ):
        command = ("calibrate", bundle_folder, "-o", tmp_path / "no", "--valid", valid)
        refused = CliRunner().invoke(main, list(map(str, command)))
        assert refused.exit_code == code, refused.output
        assert words in refused.output
    assert not (tmp_path / "no").exists()
