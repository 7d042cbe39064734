"""Labelling runs amid odd names, files of others, closed streams and readers that leave."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import BAD, GOOD, cli
from helpers.commands import ROOT
from helpers.runs import label, shell, stopped
from slow.kill_loop import lines

from ercbatch.runs.journal import Journal


@pytest.fixture
def long_source(tmp_path: Path) -> Path:
    """More than a run labels in the moments that a test gives it, with bad lines first."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(BAD * 2 + b"\n".join(lines(600, random.Random(3))) + b"\n")
    return path


def test_rejects_replace_nothing_unasked(bundle_folder: Path, source: Path) -> None:
    mine = source.with_name("mine")
    asked = ("label", source, "--bundle", bundle_folder, "--rejects")
    for out in ((), ("-o", source.with_name("out"))):
        mine.write_text("kept")
        for place, words in ((source, "is also an input"), (mine, "exists"), ("/dev/null", "no f")):
            done = cli(*asked, place, *out)
            assert done.returncode == 2, done.stderr
            assert words in done.stderr
        assert source.read_bytes() == BAD + GOOD
        assert mine.read_text() == "kept"
        assert Path("/dev/null").is_char_device()
        assert cli(*asked, mine, *out, "--force").returncode == 3
        assert json.loads(mine.read_text())["line"] == 1


def test_rejects_are_not_what_the_run_writes_otherwise(bundle_folder: Path, source: Path) -> None:
    out = source.with_name("out")
    (source.parent / "x").mkdir()
    for other in ("out", "out.part", "x/../out.manifest.json", "out.manifest.json.part"):
        done = cli("label", source, "-o", out, "--rejects", f"{source.parent}/{other}")
        assert done.returncode == 2
        assert "is written otherwise" in done.stderr
        shown = shell(f"LABEL in.jsonl -o out --rejects {source.parent}/{other}", source.parent)
        assert (shown.returncode, "is written otherwise" in shown.stderr) == (2, True)


@pytest.mark.slow
def test_two_runs_do_not_share_their_rejects(
    bundle_folder: Path, source: Path, long_source: Path
) -> None:
    shared = source.with_name("bad")
    first = source.with_name("first")
    process = label(long_source, "--bundle", bundle_folder, "-o", first, "--rejects", shared)
    while not shared.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    done = cli(
        *("label", source, "--bundle", bundle_folder, "-o", source.with_name("second")),
        *("--rejects", shared, "--force"),
    )
    process.communicate()
    assert done.returncode == 2
    assert "another run is writing there" in done.stderr
    assert not list(source.parent.glob("second*"))
    counts = json.loads(source.with_name("first.manifest.json").read_bytes())["counts"]
    assert len(shared.read_bytes().splitlines()) == counts["rejected"] > 2


@pytest.mark.slow
def test_file_that_is_not_a_journal_is_left_alone(
    bundle_folder: Path, source: Path, long_source: Path
) -> None:
    out = source.with_name("out")
    asked = ("label", long_source, "--bundle", bundle_folder, "-o", out)
    journal, part = source.with_name("out.journal"), source.with_name("out.part")
    journal.write_text("dear diary")
    for more in ((), ("--resume",)):
        assert cli(*asked, *more).returncode == 2
    assert journal.read_text() == "dear diary"
    journal.unlink()
    stopped(long_source, bundle_folder, out)
    rows = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(rows[0].replace(b"journal", b"jaurnal") + b"".join(rows[1:]))
    kept = part.read_bytes()
    for more in ((), ("--resume",)):
        done = cli(*asked, *more)
        assert done.returncode == 2
        assert "its beginning was altered" in done.stderr
    assert part.read_bytes() == kept
    journal.write_bytes(b"")  # as a run leaves it that is killed as it begins
    part.unlink()
    source.with_name("out.rejects.jsonl").unlink()
    assert cli(*asked).returncode == 3


def test_resume_refuses_a_journal_of_an_earlier_format(
    bundle_folder: Path, long_source: Path
) -> None:
    out = long_source.with_name("out")
    stopped(long_source, bundle_folder, out)
    with Journal(out.with_name("out.journal")) as journal:
        assert journal.identity is not None
        journal.begin({**journal.identity, "journal": 3})
    done = cli("label", long_source, "--bundle", bundle_folder, "-o", out, "--resume")
    assert done.returncode == 2
    assert "out.part is of another run (journal: 3, now 4)" in done.stderr


@pytest.mark.parametrize("name", ["out.part", "out.rejects.jsonl"])
def test_altered_committed_bytes_are_refused(
    bundle_folder: Path, long_source: Path, name: str
) -> None:
    out = long_source.with_name("out")
    stopped(long_source, bundle_folder, out)
    path = long_source.with_name(name)
    path.write_bytes(path.read_bytes().replace(b"e", b"E", 1))
    done = cli("label", long_source, "--bundle", bundle_folder, "-o", out, "--resume")
    assert done.returncode == 1
    assert f"{name}: it is not what its journal says" in done.stderr


def test_run_from_stdin_is_not_resumed(bundle_folder: Path, source: Path) -> None:
    command = f"LABEL - --bundle {bundle_folder} -o out --quiet"
    assert shell(f"{command} <in.jsonl", source.parent).returncode == 3
    again = shell(f"{command} --resume <in.jsonl", source.parent)
    assert again.returncode == 2
    assert "cannot be read again" in again.stderr


@pytest.mark.slow
def test_run_stopped_by_a_limit_resumes_with_a_higher_one(
    bundle_folder: Path, long_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("label", long_source, "--bundle", bundle_folder, "-o", out)
    for more in (("--max-errors", "1"), ("--max-errors", "1", "--resume")):
        done = cli(*asked, *more)
        assert done.returncode == 4
        assert "more than 1 bad lines" in done.stderr
        assert "to go on, with a higher --max-errors: " in done.stderr
    assert cli(*asked, "--max-errors", "1000", "--resume").returncode == 3


@pytest.mark.parametrize(
    "words",
    [
        "--max-line-bytes 99999999999999999999",
        "--max-line-bytes 9223372036854775807",
        "--max-turns 99999999999999999999 -o out",
        "--commit-every nan -o out",
        "-o ''",
        f"-o {'x' * 240}",
        f"-o {'x' * 300}",
        "--rejects ''",
        "--rejects nowhere/x",
        "--rejects in.jsonl/x -o out",
        "-o nowhere/x",
        "-o out --rejects .",
    ],
)
def test_unusable_options_are_refused_in_a_sentence(source: Path, words: str) -> None:
    done = shell(f"LABEL in.jsonl {words}", source.parent)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert [path.name for path in source.parent.iterdir()] == ["in.jsonl"]


def test_an_empty_name_is_no_input(source: Path) -> None:
    done = shell('LABEL "$UNSET"', source.parent)
    assert (done.returncode, done.stdout) == (4, "")
    assert "is a variable of yours not set?" in done.stderr
    unreadable = shell("LABEL /proc/self/mem -o out", source.parent)
    assert unreadable.returncode == 4
    assert "/proc/self/mem: cannot be read" in unreadable.stderr


@pytest.mark.slow
def test_output_file_is_not_read_as_input(
    bundle_folder: Path, long_source: Path, tmp_path: Path
) -> None:
    for given in (str(tmp_path / "all"), str(tmp_path / "all" / "*.jsonl")):
        folder = tmp_path / "all"
        folder.mkdir()
        shutil.copy(long_source, folder)
        asked = (Path(given), bundle_folder, folder / "out.jsonl")
        stopped(*asked, "--rejects", folder / "bad.jsonl")
        (folder / "out.jsonl").write_bytes(GOOD)  # as between the last two steps
        more = ("--rejects", folder / "bad.jsonl", "--resume", "--quiet")
        done = cli("label", given, "--bundle", bundle_folder, "-o", asked[2], *more)
        assert done.returncode == 3, done.stderr
        manifest = json.loads((folder / "out.jsonl.manifest.json").read_bytes())
        assert [Path(entry["file"]).name for entry in manifest["inputs"]] == ["long.jsonl"]
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "environment"),
    [
        ("-o 'a b\nc' -- -w.jsonl", {}),
        ("-o out -- -w.jsonl", {"ERCBATCH_LABEL_FORCE": "1"}),
        ("-o $'caf\\xe9 out' -- -w.jsonl", {}),
    ],
)
def test_printed_command_resumes(
    bundle_folder: Path, long_source: Path, words: str, environment: dict[str, str]
) -> None:
    long_source.rename(long_source.with_name("-w.jsonl"))
    asked = f"LABEL --bundle {bundle_folder} --max-errors 1 {words}"
    done = shell(asked, long_source.parent, **environment)
    assert done.returncode == 4
    again = re.search(
        r"to go on, with a higher --max-errors: python (-m ercbatch .*)\nError:",
        done.stderr,
        re.DOTALL,
    )
    assert again, done.stderr
    command = f"{sys.executable} {again[1]}".replace("--max-errors 1", "--max-errors 999")
    on = shell(command, long_source.parent, **environment)
    assert on.returncode == 3, on.stderr
    assert len([p for p in os.listdir(os.fsencode(long_source.parent)) if b"manifest" in p]) == 1


def test_closed_streams_lose_nothing(bundle_folder: Path, source: Path) -> None:
    asked = f"LABEL in.jsonl --bundle {bundle_folder}"
    done = shell(f"{asked} 2>&-", source.parent)
    assert done.returncode == 3
    (record,) = map(json.loads, done.stdout.splitlines())
    assert set(record["utterances"][0]) == {"text", "emotion", "confidence"}  # no older scores
    done = shell(f"{asked} -o out >&- 2>&- <&-", source.parent)
    assert done.returncode == 3
    assert len((source.parent / "out").read_bytes().splitlines()) == 1
    for words, code in ((f"{asked} >&-", 1), (f"LABEL - --bundle {bundle_folder} <&-", 4)):
        done = shell(words, source.parent)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert "Bad file descriptor" in done.stderr


def test_closed_stderr_stops_no_run(bundle_folder: Path, source: Path) -> None:
    source.write_bytes((BAD + GOOD) * 4000)
    done = shell(
        f"set -o pipefail; LABEL in.jsonl --bundle {bundle_folder} 2>&1 >out | head -n 1",
        source.parent,
    )
    assert done.returncode == 3
    assert len((source.parent / "out").read_bytes().splitlines()) == 4000


def test_a_reader_that_waits_does_not_hold_up_a_signal(bundle_folder: Path, source: Path) -> None:
    source.write_bytes(GOOD * 8000)
    command = (sys.executable, "-m", "ercbatch", "label", source, "--bundle", bundle_folder)
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1)  # the pipe is full
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
        assert time.monotonic() - sent < 5


def catches(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_signal_before_anything_is_imported_leaves_no_traceback(source: Path) -> None:
    for wait in (0.0, 0.05, 0.1, 0.2):
        process = label(source)
        for caught in (True, False):  # Python's own handler has come, and gone: our code runs
            while process.poll() is None and catches(process, signal.SIGINT) is not caught:
                time.sleep(0.001)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert "Traceback" not in said
        assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 3)


def test_a_run_in_the_background_is_not_stopped_by_ctrl_c(
    bundle_folder: Path, source: Path
) -> None:
    source.write_bytes((BAD + GOOD) * 4000)
    script = (
        f"trap '' INT; LABEL in.jsonl --bundle {shlex.quote(str(bundle_folder))} -o out & p=$!; "
        "sleep 1; kill -INT $p; wait $p"
    )
    assert shell(script, source.parent).returncode == 3


def test_overwritten_output_keeps_its_rights(bundle_folder: Path, source: Path) -> None:
    out = source.with_name("out")
    out.write_text("old")
    out.chmod(0o600)
    assert cli("label", source, "--bundle", bundle_folder, "-o", out, "--force").returncode == 3
    assert out.stat().st_mode & 0o777 == 0o600
    assert b"emotion" in out.read_bytes()


@pytest.mark.parametrize("head", [b"\x50\x2a\x4d\x18\x04\0\0\0abcd", b""])
def test_a_compressed_pipe_is_known_however_it_comes(
    bundle_folder: Path, source: Path, head: bytes
) -> None:
    import zstandard

    data = head + zstandard.compress(BAD + GOOD)
    command = [sys.executable, "-m", "ercbatch", "label", "-", "--bundle", str(bundle_folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for piece in (data[:1], data[1:9], data[9:]):
            process.stdin.write(piece)
            process.stdin.flush()
            time.sleep(0.5)
        process.stdin.close()
        assert len(process.stdout.read().splitlines()) == 1
    assert process.returncode == 3
