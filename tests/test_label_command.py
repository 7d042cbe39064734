"""`ercbatch label` as a user runs it."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import orjson
import pytest
import zstandard
from conftest import EXAMPLES, cli, edit_manifest
from helpers.bad_lines import BAD
from helpers.commands import ROOT

from ercbatch import Labeler
from ercbatch import cli as command
from ercbatch.bundle.manifest import MAX_DEMONSTRATIONS, RUNTIME_OF_FORM
from ercbatch.inputs.records import DEFAULT_LIMITS, InputLimits
from ercbatch.scoring.runtimes import AUTO

GOOD = b'{"id": 7, "mood": {"a": [1]}, "utterances": [{"text": "it is gone", "x": 1}]}\n'


def records(data: bytes) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in data.splitlines()]


def test_every_record_comes_back_in_order_with_its_own_fields(
    bundle_folder: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = b'{"messages": [{"role": "user", "content": "my parcel is lost"}]}\n'
    source.write_bytes(GOOD + b"\n" + chat)
    done = cli("label", source, "--bundle", bundle_folder, "-o", out, "--scores")
    assert done.returncode == 0, done.stderr
    first, second = records(out.read_bytes())
    assert (first["id"], first["mood"], first["utterances"][0]["x"]) == (7, {"a": [1]}, 1)
    for turn in (first["utterances"][0], second["messages"][0]):
        labels = ["neutral", "surprise", "fear", "sad", "joyful", "disgust", "angry"]
        assert list(turn["scores"]) == labels
        assert sum(turn["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert turn["emotion"] == max(turn["scores"], key=turn["scores"].get)
        assert turn["confidence"] == max(turn["scores"].values())
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["counts"] == {
        "lines": 3,
        "labelled": 2,
        "rejected": 0,
        "blank": 1,
        "utterances": 2,
    }
    assert not (tmp_path / "out.jsonl.part").exists()


def test_bad_lines_become_rejects_and_the_rest_is_labelled(
    bundle_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    source = EXAMPLES / "broken.jsonl"
    done = cli("label", source, "--bundle", bundle_folder, "-o", out)
    assert done.returncode == 3
    rejects = records((tmp_path / "out.jsonl.rejects.jsonl").read_bytes())
    assert [(r["line"], r["code"]) for r in rejects] == [
        (2, "json"),
        (3, "not_object"),
        (4, "no_utterances"),
        (6, "bad_text"),
    ]
    lines = source.read_bytes().split(b"\n")
    for reject in rejects:
        assert reject["file"] == str(source)
        assert source.read_bytes()[reject["byte"] :].startswith(lines[reject["line"] - 1])
        assert reject["reason"]
        assert lines[reject["line"] - 1].decode().startswith(reject["raw"])
    assert [r["id"] for r in records(out.read_bytes())] == [1, 6, 7]


def test_every_kind_of_bad_line_is_told_where_it_stands(
    bundle_folder: Path, tmp_path: Path
) -> None:
    source, out, rejects = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "bad.jsonl"
    bad = [line for line, _ in BAD.values()]
    source.write_bytes(b"".join(GOOD + line + b"\n" for line in bad) + GOOD)
    done = cli("label", source, "--bundle", bundle_folder, "-o", out, "--rejects", rejects)
    assert done.returncode == 3, done.stderr
    result = records(rejects.read_bytes())
    assert [r["code"] for r in result] == [code for _, code in BAD.values()]
    byte = 0
    for number, (line, reject) in enumerate(zip(bad, result, strict=True), start=1):
        byte += len(GOOD)
        assert (reject["line"], reject["byte"]) == (2 * number, byte)
        assert reject["raw"] == line.decode("utf-8", "replace")[:200]
        byte += len(line) + 1
    assert len(records(out.read_bytes())) == len(bad) + 1
    counts = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["counts"]
    assert counts["lines"] == 2 * len(bad) + 1 == counts["labelled"] + counts["rejected"]


def test_the_command_line_has_the_limits_of_what_it_runs() -> None:
    # It may not import that before it runs, so it names them itself.
    options = command.label.params
    defaults = {o.name: o.default for o in options if isinstance(o.default, int)}
    names = ("max_line_bytes", "max_turns", "max_characters", "max_file_bytes")
    assert InputLimits(*(defaults[name] for name in names)) == DEFAULT_LIMITS
    (runtime,) = (option.type for option in options if option.name == "runtime")
    assert isinstance(runtime, click.Choice)
    assert set(runtime.choices) == {AUTO, *RUNTIME_OF_FORM.values()}
    for subcommand in (command.label, command.bank.commands["build"]):
        (demos,) = (option.type for option in subcommand.params if option.name == "demos")
        assert isinstance(demos, click.IntRange)
        assert demos.max == MAX_DEMONSTRATIONS


def test_limits_are_options(bundle_folder: Path, tmp_path: Path) -> None:
    turn = {"text": "it is gone"}
    lines = [[turn], [turn] * 3, [{"text": "oh " * 100}], [turn] * 40]
    source = tmp_path / "in.jsonl.gz"
    data = b"".join(orjson.dumps({"utterances": line}) + b"\n" for line in lines)
    source.write_bytes(gzip.compress(data))
    asked = ("label", source, "--bundle", bundle_folder, "--quiet", "--force")
    limits = ("--max-turns", "2", "--max-characters", "200", "--max-line-bytes", "500")
    done = cli(*asked, *limits, "-o", tmp_path / "out.jsonl")
    assert done.returncode == 3
    result = records((tmp_path / "out.jsonl.rejects.jsonl").read_bytes())
    assert [r["code"] for r in result] == ["too_many_turns", "text_too_long", "too_long"]
    assert "over 2 turns" in result[0]["reason"]
    bomb = cli(*asked, "--max-file-bytes", "300", "-o", tmp_path / "bomb.jsonl")
    assert bomb.returncode == 3
    assert "over 300 bytes" in bomb.stderr
    (reject,) = records((tmp_path / "bomb.jsonl.rejects.jsonl").read_bytes())
    assert (reject["line"], reject["code"]) == (3, "file_too_large")


def test_a_broken_file_is_one_reject_and_the_others_are_labelled(
    bundle_folder: Path, tmp_path: Path
) -> None:
    packed = gzip.compress(
        b"".join(b'{"id": %d, "utterances": [{"text": "oh"}]}\n' % n for n in range(3000))
    )
    files = {
        "a.jsonl": GOOD.decode().encode("utf-16"),
        "b.jsonl.gz": packed[: len(packed) // 2],
        "c.jsonl.gz": packed[:-8] + bytes(4) + packed[-4:],  # another checksum
        "d.jsonl": GOOD,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = cli("label", tmp_path, "--bundle", bundle_folder, "--quiet", "-o", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    rejects = records((tmp_path / "out.rejects.jsonl").read_bytes())
    assert [r["code"] for r in rejects] == ["utf_16", "broken", "broken"]
    broke = rejects[1]["line"], rejects[2]["line"]
    assert 1000 < broke[0] < broke[1] <= 3001
    assert [line.count(": ") >= 2 for line in done.stderr.splitlines()] == [True] * 3
    assert (
        f"c.jsonl.gz, line {broke[1]}: the file is broken from here on (Error -3 while"
        in done.stderr
    )
    labelled = records((tmp_path / "out").read_bytes())
    assert len(labelled) == broke[0] - 1 + broke[1] - 1 + 1
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert counts["lines"] == len(labelled) + 3


def test_max_errors_gives_up(bundle_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = cli(
        *("label", EXAMPLES / "broken.jsonl", "--bundle", bundle_folder),
        *("-o", out, "--max-errors", "1"),
    )
    assert done.returncode == 4
    assert "more than 1 bad lines" in done.stderr
    assert not out.exists()


def test_compressed_files_folders_and_stdin_are_the_same_input(
    bundle_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(GOOD))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(GOOD))
    (folder / "notes.txt").write_text("not read")
    done = cli("label", folder, "--bundle", bundle_folder, "--quiet")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
    piped = subprocess.run(
        [sys.executable, "-m", "ercbatch", "label", "-", "--bundle", bundle_folder, "--quiet"],
        input=GOOD,
        capture_output=True,
        cwd=ROOT,
        timeout=120,
    )
    assert piped.stdout.decode().splitlines() == lines[:1]


def test_output_is_never_overwritten_unasked(bundle_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD)
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    done = cli("label", source, "--bundle", bundle_folder, "-o", out)
    assert (done.returncode, out.read_text()) == (2, "precious")
    assert "--force" in done.stderr
    same = cli("label", source, "--bundle", bundle_folder, "-o", source, "--force")
    assert (same.returncode, source.read_bytes()) == (2, GOOD)
    assert cli("label", source, "--bundle", bundle_folder, "-o", out, "--force").returncode == 0


def test_below_the_confidence_asked_for_the_emotion_is_null(
    bundle_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"utterances": [{"text": "it is gone"}, {"text": "  "}]}\n')
    done = cli("label", source, "--bundle", bundle_folder, "--min-confidence", "1", "--quiet")
    said, blank = json.loads(done.stdout)["utterances"]
    assert said["emotion"] is None
    assert 0 < said["confidence"] < 1
    assert (blank["emotion"], blank["confidence"]) == (None, None)


def test_a_dry_run_counts_and_writes_nothing(bundle_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    source = EXAMPLES / "group_chat.jsonl"
    done = cli("label", source, "--bundle", bundle_folder, "-o", out, "--dry-run")
    assert done.returncode == 0, done.stderr
    dialogues = records(source.read_bytes())
    turns = sum(len(dialogue["utterances"]) for dialogue in dialogues)
    assert done.stdout.startswith(f"{len(dialogues)} dialogues, {turns} utterances")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_within_seconds(
    bundle_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out.jsonl"
    command = (sys.executable, "-m", "ercbatch", "label", "-", "--bundle", bundle_folder, "-o", out)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdin is not None
    process.stdin.write(GOOD * 2000)
    process.stdin.flush()
    time.sleep(3)
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + number
    assert number.name in errors.decode()
    assert not out.exists()


def test_a_closed_pipe_is_quiet(bundle_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD * 3000)
    done = subprocess.run(
        f"{sys.executable} -m ercbatch label {source} --bundle {bundle_folder} --quiet | head -n 1",
        shell=True,
        capture_output=True,
        cwd=ROOT,
        timeout=120,
    )
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == b""


@pytest.mark.slow
def test_a_slow_reader_gets_everything_and_fills_no_memory(
    bundle_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD * 8000)
    command = (sys.executable, "-m", "ercbatch", "label", source, "--bundle", bundle_folder)
    with subprocess.Popen((*command, "--quiet"), stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        pages = Path(f"/proc/{process.pid}/statm")
        lines = [process.stdout.readline() for _ in range(10)]
        time.sleep(1)
        before = int(pages.read_text().split()[1])
        for _ in range(8):  # it has long filled the pipe, and waits
            time.sleep(0.25)
            lines.append(process.stdout.readline())
        assert int(pages.read_text().split()[1]) - before < 512  # pages: 2 MB
        assert process.poll() is None
        lines += process.stdout.readlines()
    assert process.returncode == 0
    assert len(lines) == 8000
    assert all(orjson.loads(line)["utterances"][0]["emotion"] for line in lines)


def test_demonstrations_and_later_turns_change_what_is_seen(bundle_folder: Path) -> None:
    dialogue = {"utterances": [{"text": "it is gone"}, {"text": "thank you"}]}

    def first(demonstrations: int | None = None, context: str = "past") -> float | None:
        labeler = Labeler(str(bundle_folder), demonstrations=demonstrations, context=context)
        return next(labeler.label([dialogue])).labels[0].confidence

    assert len({first(), first(demonstrations=2), first(context="both")}) == 3


def test_later_turns_are_refused_by_a_bundle_that_never_saw_any(
    bundle_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "past"
    shutil.copytree(bundle_folder, folder)
    edit_manifest(folder, lambda value: value.update(later_turns=0))
    done = cli("label", EXAMPLES / "group_chat.jsonl", "--bundle", folder, "--context", "both")
    assert done.returncode == 2
    assert "not trained with later turns" in done.stderr


def test_the_runtime_needs_neither_torch_nor_transformers(
    bundle_folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "label.py"
    script.write_text(
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'onnx', 'train', 'export'):\n"
        "    sys.modules[name] = None\n"
        "from ercbatch import Labeler\n"
        f"labeler = Labeler({str(bundle_folder)!r}, demonstrations=1)\n"
        "print(next(labeler.label([{'utterances': [{'text': 'hi'}]}])).labels[0].emotion)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_labelling_opens_no_socket_unpickles_nothing_and_runs_no_program(
    bundle_folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "label.py"
    script.write_text(
        "import sys\n"
        "from ercbatch import Labeler\n"
        "seen = []\n"
        "watched = ('socket.', 'pickle.', 'subprocess.', 'os.system', 'os.exec',\n"
        "           'os.posix_spawn', 'os.fork', 'urllib.')\n"
        "sys.addaudithook(lambda e, a: seen.append(e) if e.startswith(watched) else None)\n"
        f"labeler = Labeler({str(bundle_folder)!r}, demonstrations=1)\n"
        "print(next(labeler.label([{'utterances': [{'text': 'hi'}]}])).labels[0].emotion)\n"
        "print(seen)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "[]"


def test_the_command_line_imports_only_click_and_the_standard_library() -> None:
    code = (
        "import sys, click; before = set(sys.modules); import ercbatch.cli\n"
        "imported = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(imported - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['ercbatch']", done.stderr
