"""A bundle that an earlier ercbatch wrote labels as it did then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import EXAMPLES, cli

from ercbatch.bundle.bundle import read_info
from ercbatch.bundle.manifest import FORMAT

FROZEN = Path(__file__).resolve().parent / "bundles"
OLD = [folder.name for folder in sorted(FROZEN.iterdir()) if folder.is_dir()]


@pytest.mark.parametrize("version", OLD)
def test_an_older_bundle_gives_the_labels_that_it_gave(version: str) -> None:
    assert read_info(FROZEN / version).format == version != FORMAT
    assert cli("bundle", "verify", FROZEN / version).returncode == 0
    done = cli(
        *("label", EXAMPLES / "group_chat.jsonl", "--bundle", FROZEN / version),
        *("--scores", "--quiet"),
    )
    assert done.returncode == 0, done.stderr
    then = (FROZEN / f"group_chat.{version}.jsonl").read_text(encoding="utf-8")
    for line, old in zip(done.stdout.splitlines(), then.splitlines(), strict=True):
        for turn, before in zip(
            json.loads(line)["utterances"], json.loads(old)["utterances"], strict=True
        ):
            assert turn["emotion"] == before["emotion"]
            # Sums of floats are in another order on another processor.
            assert turn["scores"] == pytest.approx(before["scores"], abs=1e-3)
