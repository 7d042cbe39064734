"""`train/mini/make.sh`, from publishers' files to a bundle, at toy size."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path

import pytest
from conftest import EXAMPLES, cli, write_model, write_sentence_encoder
from helpers.commands import ROOT
from helpers.gguf_file import write_gguf

pytestmark = pytest.mark.transformers

MELD = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
EMORY = ("Neutral", "Joyful", "Peaceful", "Powerful", "Mad", "Sad", "Scared")
CHAT = ("Happy", "Neutral", "Sad", "Angry", "Fearful", "Disgusted", "Surprised")
MAKE = ROOT / "train" / "mini" / "make.sh"
SAID = ("the parcel is gone", "oh no, where is my train", "yes, thank you", "who was here now")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets in the publishers' forms: 12 dialogues of 4 lines to train on, 4 to validate on."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("meld", "emorynlp", "goemotions", "topical_chat", "xed", "written"):
        (folder / name).mkdir()
    lines = (f"{said}, {number}" for number, said in zip(count(), cycle(SAID)))
    for split, dialogues in (("train", 12), ("dev", 4)):
        write_rows(
            folder / "meld" / f"{split}_sent_emo.csv",
            ["Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"],
            ([next(lines), "AB"[t % 2], MELD[(d + t) % 7], d, t] for d, t in turns(dialogues)),
            ["Season", "Episode"],
        )
        write_rows(
            folder / "emorynlp" / f"emorynlp_{split}_final.csv",
            ["Utterance", "Speaker", "Emotion", "Scene_ID", "Utterance_ID"],
            ([next(lines), "['Ana']", EMORY[(d + t) % 7], d, t] for d, t in turns(dialogues)),
            ["Season", "Episode"],
        )
        rows = (f"{next(lines)}\t{number % 7}\tx{number}\n" for number in range(10 * dialogues))
        (folder / "goemotions" / f"{split}.tsv").write_text("".join(rows))
    rows = (f"{next(lines)}\t{1 + number % 8}\n" for number in range(40))
    (folder / "xed" / "en-annotated.tsv").write_text("".join(rows))
    for part in ("train", "valid", "held-out"):
        written = (
            {"utterances": [{"text": next(lines), "label": MELD[(d + t) % 7]} for t in range(4)]}
            for d in range(8)
        )
        text = "".join(json.dumps(dialogue) + "\n" for dialogue in written)
        (folder / "written" / f"written-{part}.jsonl").write_text(text)
    for split in ("freq", "rare"):
        chats = {
            f"t_{d}": {
                "content": [
                    {"message": next(lines), "agent": "ab"[t % 2], "sentiment": CHAT[(d + t) % 7]}
                    for t in range(4)
                ]
            }
            for d in range(5)
        }
        (folder / "topical_chat" / f"valid_{split}.json").write_text(json.dumps(chats))
    return folder


def turns(dialogues: int) -> Iterator[tuple[int, int]]:
    return ((d, t) for d in range(dialogues) for t in range(4))


def write_rows(path: Path, names: list[str], rows: Iterator[list[object]], ones: list[str]) -> None:
    """Write a CSV; the columns `ones` hold 1 throughout."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *ones])
        writer.writerows([*row, *("1" for _ in ones)] for row in rows)


@pytest.mark.slow
def test_make_sh_builds_a_bundle_that_labels(data: Path, tmp_path: Path) -> None:
    minilm = write_sentence_encoder(tmp_path / "minilm")
    llama = write_gguf(tmp_path / "llama.gguf", write_model(tmp_path / "llama", "llama"))
    work = tmp_path / "work"
    done = subprocess.run(
        ["bash", MAKE, data, minilm, llama, llama, work, "--accept-loss"],
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONWARNINGS": "ignore",
            "WRITTEN": str(data / "written"),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("student", "longer", "larger", "domains", "last"):
        run = json.loads((work / name / "run.json").read_text())
        assert len(run["epochs"]) == run["recipe"]["epochs"]
    assert json.loads((work / "averaged" / "run.json").read_text())["averaged"] == [
        *["longer"] * 3,
        "student",
    ]
    said = cli("bundle", "verify", work / "mini")
    assert said.returncode == 0, said.stderr
    said = cli("label", EXAMPLES / "group_chat.jsonl", "--bundle", f"{work}/mini/", "--quiet")
    assert said.returncode == 0, said.stderr
    assert all("emotion" in u for u in json.loads(said.stdout.splitlines()[0])["utterances"])
