"""Runs that are killed, stopped, or fail: nothing is lost, nothing comes twice."""

from __future__ import annotations

import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import cli, edit_manifest
from helpers.commands import ROOT
from helpers.runs import begun, committed, label
from slow.kill_loop import kill_loop, lines


@pytest.fixture(scope="module")
def long_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More dialogues than a run labels within the moments that a test gives it."""
    path = tmp_path_factory.mktemp("long") / "in.jsonl"
    path.write_bytes(b"\n".join(lines(600, random.Random(3))) + b"\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(
    bundle_folder: Path, long_input: Path, tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    """What labelling that comes to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    assert cli("label", long_input, "--bundle", bundle_folder, "-o", out).returncode == 3
    return out.read_bytes()


@pytest.mark.slow
def test_run_killed_many_times_writes_the_same_bytes(bundle_folder: Path, tmp_path: Path) -> None:
    # It raises where a run that was killed ends otherwise than one that was not.
    kill_loop(tmp_path, 25, seed=1, count=40, bundle=str(bundle_folder))


def test_killed_run_resumes_from_its_last_commit(
    bundle_folder: Path, long_input: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    asked = (long_input, "--bundle", bundle_folder, "-o", out, "--commit-every", "0.1")
    process = label(*asked)
    begun(process, out)
    process.kill()
    process.communicate()
    before = committed(out)
    part = tmp_path / "out.jsonl.part"
    assert not out.exists()
    kept = part.read_bytes()
    process = label(*asked, "--resume")
    while process.poll() is None:
        with suppress(FileNotFoundError):  # once it is in its place
            # What was committed is never written again.
            assert part.stat().st_size >= len(b"".join(kept.splitlines(True)[:before]))
        time.sleep(0.05)
    assert process.returncode == 3
    process.communicate()
    assert out.read_bytes() == undisturbed
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.jsonl",
        "out.jsonl.manifest.json",
        "out.jsonl.rejects.jsonl",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_commits_and_prints_the_resume_command(
    bundle_folder: Path,
    long_input: Path,
    undisturbed: bytes,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    out = tmp_path / "it's out.jsonl"
    out.write_text("old")
    process = label(long_input, "--bundle", bundle_folder, "-o", out, "--force")
    while not out.with_name(out.name + ".part").exists():
        time.sleep(0.02)
    time.sleep(1)  # no commit is due yet
    assert committed(out) == 0
    sent = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - sent < 5
    assert process.returncode == 75
    assert committed(out) > 0
    assert out.read_text() == "old"
    again = re.search("^ercbatch: to go on: python (-m ercbatch label .*)$", said, re.MULTILINE)
    assert again, said
    done = subprocess.run([sys.executable, *shlex.split(again[1])], cwd=ROOT, capture_output=True)
    assert done.returncode == 3, done.stderr
    assert out.read_bytes() == undisturbed


def test_second_signal_ends_the_run_at_once(
    bundle_folder: Path, tmp_path: Path, long_input: Path, faults: Path
) -> None:
    out = tmp_path / "out.jsonl"
    # The first two are of a new journal; the third, of a commit, is answered late.
    process = label(
        *(long_input, "--bundle", bundle_folder, "-o", out, "--commit-every", "0.1"),
        LD_PRELOAD=str(faults),
        FAULT_FOLDER=str(tmp_path),
        FAULT_CALL="fsync",
        FAULT_NTH="3",
        FAULT_SLOW="60",
    )
    part = tmp_path / "out.jsonl.part"
    while not part.exists() or not part.stat().st_size:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=2)
    assert process.returncode == -signal.SIGTERM


def test_stdin_cannot_be_resumed(bundle_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = (sys.executable, "-m", "ercbatch", "label", "-", "--bundle", bundle_folder, "-o", out)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b'{"utterances": [{"text": "it is gone"}]}\n' * 500)
        process.stdin.flush()
        while not (tmp_path / "out.jsonl.part").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read().decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stdin and pipes cannot be read again" in said
    for more, words in (("--quiet", "--force begins anew"), ("--resume", "cannot be read again")):
        done = subprocess.run((*command, more), input=b"", capture_output=True, cwd=ROOT)
        assert done.returncode == 2
        assert words in done.stderr.decode()


@pytest.mark.slow
def test_resume_names_what_differs_from_the_first_run(bundle_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bundle_folder, tmp_path / "other")
    edit_manifest(other, lambda value: value["window"].update(turns=2))
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    data = b"\n".join(lines(400, random.Random(4))) + b"\n"
    source.write_bytes(data)
    asked = ("-o", out, "--commit-every", "0.1")
    process = label(source, "--bundle", bundle_folder, *asked)
    begun(process, out)
    process.kill()
    process.communicate()
    plain = cli("label", source, "--bundle", bundle_folder, "-o", out)
    assert plain.returncode == 2
    assert "--resume goes on with it, --force begins anew" in plain.stderr

    def refused(*arguments: str | Path, words: str) -> None:
        done = cli("label", *arguments, *asked, "--resume")
        assert done.returncode == 2, done.stderr
        assert words in done.stderr

    same = (source, "--bundle", bundle_folder)
    refused(*same, "--scores", words="options.scores: False, now True")
    refused(*same, "--demos", "2", words="options.demonstrations: 0, now 2")
    refused(*same, "--min-confidence", "0.5", words="options.min_confidence: 0.0, now 0.5")
    refused(*same, "--max-turns", "9", words="options.turns: 100000, now 9")
    refused(*same, "--context", "both", words="options.context: past, now both")
    refused(*same, "--rejects", tmp_path / "bad.jsonl", words="rejects: ")
    refused(source, "--bundle", other, words="bundle.sha256: ")
    refused(source, source, "--bundle", bundle_folder, words="inputs: ")
    for changed in (data + b"\n", data[:-1] + b" ", data.replace(b"happy", b"harpy")):
        source.write_bytes(changed)
        refused(*same, words=f"inputs.1 ({source}).")
    source.write_bytes(data)
    journal = tmp_path / "out.jsonl.journal"
    assert b'"onnxruntime":"' in journal.read_bytes()
    # Threads, and what is only said or when it is given up, may be others.
    more = ("--resume", "--threads", "1", "--quiet", "--max-errors", "100000")
    assert cli("label", *same, *asked, *more).returncode == 3
    alone = tmp_path / "alone.jsonl"
    assert cli("label", *same, "-o", alone).returncode == 3
    assert out.read_bytes() == alone.read_bytes()


@pytest.mark.slow
def test_resume_of_a_complete_run_does_nothing(bundle_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"utterances": [{"text": "it is gone"}]}\n')
    asked = ("label", source, "--bundle", bundle_folder, "-o", out, "--resume")
    assert cli(*asked).returncode == 0
    written = out.stat()
    again = cli(*asked)
    assert (again.returncode, out.stat().st_mtime_ns) == (0, written.st_mtime_ns)
    assert "1 dialogues, 1 utterances" in again.stderr
    for more, words in (("--scores", "options.scores: False, now True"), ("--force", "one of the")):
        refused = cli(*asked, more)
        assert refused.returncode == 2
        assert words in refused.stderr
    manifest = tmp_path / "out.jsonl.manifest.json"
    text = manifest.read_text()
    for odd in ("[" * 100_000, text.replace('"past"', "[" * 900 + "]" * 900), "{}", ""):
        manifest.write_text(odd)
        refused = cli(*asked)
        assert refused.returncode == 2, refused.stderr
        assert "Traceback" not in refused.stderr
    manifest.write_text(text)
    out.write_text("mine")
    refused = cli(*asked)
    assert (refused.returncode, out.read_text()) == (2, "mine")
    assert "output.sha256" in refused.stderr


@pytest.mark.slow
def test_two_runs_cannot_write_to_one_output(
    bundle_folder: Path, long_input: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    asked = (long_input, "--bundle", bundle_folder, "-o", out, "--commit-every", "0.1")
    first = label(*asked)
    begun(first, out)
    for more in ("--resume", "--force"):
        second = cli("label", *asked, more)
        assert second.returncode == 2
        assert "another run is writing there" in second.stderr
    first.communicate(timeout=120)
    assert first.returncode == 3
    assert out.read_bytes() == undisturbed


@pytest.mark.slow
def test_a_bundle_replaced_meanwhile_changes_nothing(
    bundle_folder: Path, long_input: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    bundle, out = shutil.copytree(bundle_folder, tmp_path / "bundle"), tmp_path / "out.jsonl"
    process = label(long_input, "--bundle", bundle, "-o", out, "--commit-every", "0.1")
    begun(process, out)
    for path in bundle.iterdir():
        path.write_bytes(b"no longer")
    process.communicate(timeout=120)
    assert process.returncode == 3
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize("gone", ["folder", "part"])
def test_an_output_that_is_removed_meanwhile_is_an_error(
    bundle_folder: Path, long_input: Path, tmp_path: Path, gone: str
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    out = folder / "out.jsonl"
    process = label(long_input, "--bundle", bundle_folder, "-o", out, "--commit-every", "0.1")
    begun(process, out)
    if gone == "folder":
        shutil.rmtree(folder)
    else:
        (folder / "out.jsonl.part").unlink()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "somebody has moved or removed it" in said
    assert not out.exists()


@pytest.mark.slow
def test_an_input_that_grows_meanwhile_is_an_error(
    bundle_folder: Path, long_input: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    shutil.copy(long_input, source)
    process = label(source, "--bundle", bundle_folder, "-o", out, "--commit-every", "0.1")
    begun(process, out)
    with source.open("ab") as file:
        file.write(b'{"utterances": [{"text": "late"}]}\n')
    _, said = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "was changed while it was labelled" in said
    assert not out.exists()


def test_inputs_are_not_written(bundle_folder: Path, tmp_path: Path) -> None:
    names = ("x", "x.part", "x.journal", "x.manifest.json", "x.rejects.jsonl")
    for name in names:
        source = tmp_path / name
        source.write_bytes(b'{"utterances": [{"text": "oh"}]}\n')
        for more in ("--force", "--resume"):
            done = cli("label", source, "--bundle", bundle_folder, "-o", tmp_path / "x", more)
            assert done.returncode == 2
            assert "is also an input" in done.stderr
        assert [p.name for p in tmp_path.iterdir()] == [name]
        source.unlink()
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n")
    own = cli("label", source, "-o", tmp_path / "o", "--rejects", tmp_path / "o.part")
    assert (own.returncode, "choose another --rejects" in own.stderr) == (2, True)
    device = cli("label", source, "-o", "/dev/null", "--force")
    assert (device.returncode, "is no file" in device.stderr) == (2, True)
    assert Path("/dev/null").is_char_device()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_run_stopped_by_a_full_disk_resumes_when_there_is_room(
    bundle_folder: Path, long_input: Path, undisturbed: bytes, small_disk: Path
) -> None:
    out = small_disk / "out.jsonl"
    asked = ("label", long_input, "--bundle", bundle_folder, "-o", out)
    full = cli(*asked)
    assert full.returncode == 75
    assert "No space left on device" in full.stderr
    assert "to go on: " in full.stderr
    assert "Traceback" not in full.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert cli(*asked, "--resume").returncode == 3
    assert out.read_bytes() == undisturbed


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(
    bundle_folder: Path, long_input: Path, undisturbed: bytes, tmp_path: Path, faults: Path
) -> None:
    out = tmp_path / "out.jsonl"
    done = cli(
        *("label", long_input, "--bundle", bundle_folder, "-o", out),
        LD_PRELOAD=str(faults),
        FAULT_CLOCK="-1000000",
    )
    assert done.returncode == 3
    assert out.read_bytes() == undisturbed
