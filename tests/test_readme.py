"""Every command of the README runs, in its order, as it is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLES, cli, write_sentence_encoder
from helpers.commands import ROOT

pytestmark = pytest.mark.transformers

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Installing is what the checks' own setup does, and the tests are what is running now.
COMMANDS = [
    c
    for c in re.findall(r"^\$ (.*)$", README, re.MULTILINE)
    if not c.startswith(("pip install", "python -m pytest"))
]


@pytest.mark.slow
def test_the_commands_of_the_readme_work(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    write_sentence_encoder(tmp_path / "all-MiniLM-L6-v2")
    for command in COMMANDS:
        command, _, comment = command.partition("  # exit ")
        words = command.replace("ercbatch ", f"{sys.executable} -m ercbatch ", 1)
        if command.startswith("python "):
            words = command.replace("python ", f"{sys.executable} ", 1)
        done = subprocess.run(
            words,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == int(comment or 0), f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_python_of_the_readme_works(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(block, {})
    emotion, confidence = capsys.readouterr().out.split()
    assert emotion.isalpha()
    assert 0 < float(confidence) <= 1


def test_every_command_is_documented() -> None:
    from ercbatch.cli import main

    for name in main.commands:
        assert f"ercbatch {name}" in README


def test_the_picture_of_the_readme_is_what_is_printed() -> None:
    shown = re.findall(r"^ +(\w+) +(\d+)%  (\w+): (.*)$", README, re.MULTILINE)
    done = cli("label", EXAMPLES / "group_chat.jsonl", "--quiet")
    said = json.loads(done.stdout.splitlines()[0])["utterances"]
    assert [(e, who, text) for e, _, who, text in shown] == [
        (u["emotion"], u["speaker"], u["text"]) for u in said
    ]
    # Processors round differently.
    for (_, percent, _, _), utterance in zip(shown, said, strict=True):
        assert abs(int(percent) / 100 - utterance["confidence"]) < 0.02
