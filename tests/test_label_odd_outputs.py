"""What is in the place of an output, what becomes of it meanwhile, and writes that fail late."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BAD, GOOD, cli
from helpers.commands import ROOT
from helpers.runs import begun, label, shell, stopped

TURNS = b'{"id": %d, "notes": "%s", "utterances": [{"text": "it is gone"}]}\n'


def cli_amid(
    faults: Path, folder: Path, call: str, number: int, *asked: str | Path, **fault: str
) -> subprocess.CompletedProcess[str]:
    """Run `ercbatch` where one of its calls on the files of a folder fails."""
    return cli(
        *asked,
        LD_PRELOAD=str(faults),
        FAULT_FOLDER=str(folder),
        FAULT_CALL=call,
        FAULT_NTH=str(number),
        FAULT_ERRNO=str(errno.EIO),
        **fault,
    )


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
@pytest.mark.parametrize(
    "name", ["out", "out.part", "out.journal", "out.manifest.json", "out.rejects.jsonl"]
)
def test_output_that_is_not_a_file_is_refused(
    bundle_folder: Path, source: Path, name: str, kind: str
) -> None:
    place, other = source.with_name(name), source.with_name("other")
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(other)
        if kind == "link":
            other.write_text("mine")
    out = source.with_name("out")
    done = cli("label", source, "--bundle", bundle_folder, "-o", out, "--force")
    assert done.returncode == 2, done.stderr
    assert str(place) in done.stderr
    assert not other.exists() or other.read_text() == "mine"


@pytest.mark.parametrize("place", ["/proc/bad", "x" * 300])
def test_rejects_that_cannot_be_made_leave_nothing(
    bundle_folder: Path, source: Path, place: str
) -> None:
    for out in ("", "-o out"):
        done = shell(
            f"LABEL in.jsonl --bundle {bundle_folder} --rejects {place} {out}", source.parent
        )
        assert done.returncode == 2, done.stderr
        assert "choose a" in done.stderr
        assert [path.name for path in source.parent.iterdir()] == ["in.jsonl"]


@pytest.mark.slow
def test_failed_write_duplicates_no_line(bundle_folder: Path, source: Path, faults: Path) -> None:
    """Outputs of over a megabyte are written between the commits too, and may be in part."""
    source.write_bytes(b"".join(TURNS % (n, b"x" * 300_000) for n in range(12)))
    for number in range(1, 7):
        out = source.with_name(f"out{number}") / "out"
        out.parent.mkdir()
        asked = ("label", source, "--bundle", bundle_folder, "-o", out, "--commit-every", "0.05")
        # A commit is due meanwhile.
        done = cli_amid(faults, out.parent, "write", number, *asked, FAULT_SLOW="1")
        assert done.returncode == 75, done.stderr
        assert cli(*asked, "--resume").returncode == 0
        assert [json.loads(line)["id"] for line in out.read_bytes().splitlines()] == [*range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 4, 5])
def test_failed_last_commit_fails_the_run(
    bundle_folder: Path, source: Path, faults: Path, number: int
) -> None:
    """The first two are of a new journal; then come rejects, output and journal of a commit."""
    source.write_bytes(BAD + b"".join(TURNS % (n, b"") for n in range(300)))
    out = source.with_name("out")
    asked = ("label", source, "--bundle", bundle_folder, "-o", out, "--commit-every", "0.01")
    done = cli_amid(faults, source.parent, "fsync", number, *asked, FAULT_SLOW="4")
    assert done.returncode == 75, done.stderr
    assert not out.exists()
    assert cli(*asked, "--resume").returncode == 3
    assert [json.loads(line)["id"] for line in out.read_bytes().splitlines()] == [*range(300)]


def test_altered_output_is_not_put_in_place(
    bundle_folder: Path, source: Path, faults: Path
) -> None:
    out = source.with_name("out")
    asked = ("label", source, "--bundle", bundle_folder, "-o", out)
    done = cli_amid(faults, source.parent, "rename", 1, *asked)
    assert done.returncode == 75
    source.with_name("out.part").write_text("something else")
    done = cli(*asked, "--resume")
    assert done.returncode == 1
    assert "out.part: it is not what was written" in done.stderr
    assert not out.exists()


def test_failed_run_from_stdin_cannot_be_resumed(
    bundle_folder: Path, source: Path, faults: Path
) -> None:
    done = shell(
        f"LABEL - -o out --bundle {bundle_folder} < in.jsonl",
        source.parent,
        LD_PRELOAD=str(faults),
        FAULT_FOLDER=str(source.parent),
        FAULT_CALL="fsync",
        FAULT_NTH="4",
        FAULT_ERRNO=str(errno.EIO),
    )
    assert done.returncode == 1
    assert "stdin and pipes cannot be read again: see to it, and begin anew" in done.stderr
    assert "go on" not in done.stderr


def test_changed_input_is_labelled_from_the_start(bundle_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    good = b"".join(TURNS % (n, b"") for n in range(3000))
    source.write_bytes(good)
    asked = ("label", source, "--bundle", bundle_folder, "-o", out, "--commit-every", "0.05")
    process = label(*asked[1:])
    begun(process, out)
    with source.open("r+b") as file:  # one that reads on finds other text
        file.write(good.replace(b"gone", b"cold"))
    _, said = process.communicate()
    assert process.returncode == 4, said
    assert "it was changed while it was labelled" in said
    source.write_bytes(good)
    done = cli(*asked, "--resume")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().count(b"gone") == 3000


def test_input_is_not_mistaken_for_an_earlier_output(bundle_folder: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(GOOD)
    assert shell(f"LABEL data/a.jsonl --bundle {bundle_folder} -o out", tmp_path).returncode == 0
    done = shell(
        f"LABEL data --bundle {bundle_folder} -o out --rejects data/b.jsonl --force", tmp_path
    )
    assert done.returncode == 2
    assert "data/b.jsonl is also an input" in done.stderr
    assert (tmp_path / "data" / "b.jsonl").read_bytes() == GOOD


def test_missing_input_is_not_taken_for_a_pipe(bundle_folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path, count in zip(paths, (8000, 1), strict=True):
        path.write_bytes(TURNS % (1, b"") * count)
    out, away = tmp_path / "out", tmp_path / "away"
    asked: tuple[str | Path, ...] = (*paths, "--bundle", bundle_folder, "-o", out)
    asked += ("--commit-every", "0.05")
    process = label(*asked)
    begun(process, out)
    paths[1].rename(away)
    _, said = process.communicate()
    assert process.returncode == 4
    assert "to go on: " in said
    assert "b.jsonl: cannot be read (No such file" in said
    away.rename(paths[1])
    done = cli("label", *asked, "--resume")
    assert done.returncode == 0, done.stderr
    assert len(out.read_bytes().splitlines()) == 8001


def test_complete_run_can_be_repeated_from_another_folder(
    bundle_folder: Path, source: Path
) -> None:
    asked = f"LABEL . --bundle {bundle_folder} -o out.jsonl --rejects bad.jsonl --resume"
    for _ in range(2):
        done = shell(asked, source.parent)
        assert done.returncode == 3, done.stderr


def test_changed_input_is_named(bundle_folder: Path, tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.jsonl").write_bytes(TURNS % (number, b"") * 300)
    out = tmp_path / "results"
    stopped(tmp_path, bundle_folder, out)
    with (tmp_path / "7.jsonl").open("ab") as file:
        file.write(GOOD)
    done = cli("label", tmp_path, "--bundle", bundle_folder, "-o", out, "--resume")
    assert done.returncode == 2
    named = re.findall(r"inputs\.\d+ \(([^)]*)\)\.\w+", done.stderr)
    assert set(named) == {str(tmp_path / "7.jsonl")}


def test_failing_stderr_stops_no_run(bundle_folder: Path, source: Path) -> None:
    done = shell(f"LABEL in.jsonl --bundle {bundle_folder} -o out 2>/dev/full", source.parent)
    assert done.returncode == 3
    assert len(source.with_name("out").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("asked", ["--force", "--resume"])
def test_command_line_overrides_the_environment(
    bundle_folder: Path, source: Path, asked: str
) -> None:
    other = {"--force": "ERCBATCH_LABEL_RESUME", "--resume": "ERCBATCH_LABEL_FORCE"}[asked]
    source.with_name("out").write_text("old")
    done = shell(
        f"LABEL in.jsonl --bundle {bundle_folder} -o out {asked}", source.parent, **{other: "1"}
    )
    assert done.returncode == (3 if asked == "--force" else 2)
    assert (source.with_name("out").read_text() == "old") is (asked == "--resume")


def test_options_have_their_own_names_in_the_environment(bundle_folder: Path) -> None:
    shown = cli("bundle", "show", bundle_folder, ERCBATCH_BUNDLE_SHOW_JSON="1")
    assert json.loads(shown.stdout)["name"] == "tiny"
    command = "bank build examples/my_examples.jsonl -o nowhere"
    done = subprocess.run(
        [sys.executable, "-m", "ercbatch", *shlex.split(command)],
        env={**os.environ, "ERCBATCH_BANK_BUILD_BUNDLE": "no such bundle"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert "no such bundle" in done.stderr
