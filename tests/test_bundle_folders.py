"""Output folders: complete or absent, and nobody's work replaced by mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ercbatch.bundle.folders import check_output, whole_folder
from ercbatch.errors import OutputError, UsageError

MARKER = "bundle.json"


def write(folder: Path, text: str, *, force: bool = False) -> None:
    with whole_folder(folder, MARKER, force=force) as part:
        (part / MARKER).write_text(text)


def test_force_replaces_only_folders_of_its_own_kind(tmp_path: Path) -> None:
    thesis = tmp_path / "docs" / "thesis"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    with pytest.raises(UsageError, match="exists: choose another folder, or give --force"):
        write(thesis.parent, "new")
    with pytest.raises(UsageError, match=r"has no bundle.json: --force replaces only what"):
        write(thesis.parent, "new", force=True)
    with pytest.raises(UsageError, match="is not a folder"):
        write(thesis, "new", force=True)
    with pytest.raises(UsageError, match=r"nothing can be written to .*thesis"):
        write(thesis / "deep" / "bundle", "new")
    with pytest.raises(UsageError, match="File name too long"):
        write(tmp_path / ("x" * 300), "new")
    assert thesis.read_text() == "mine"
    write(tmp_path / "b", "old")
    write(tmp_path / "b", "new", force=True)
    assert (tmp_path / "b" / MARKER).read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "docs"]


def test_inputs_are_not_overwritten(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    write(run, "read")
    write(tmp_path / "runs" / "two", "beside")
    (tmp_path / "link").symlink_to(run)
    for output in (run, tmp_path / "link", run / ".." / "one", run.parent):
        with pytest.raises(UsageError, match="is read from there"):
            check_output(output, MARKER, force=True, inputs=["a/hub-id", run])
    check_output(run / "inside", MARKER, force=True, inputs=[run])


def test_replacing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / MARKER).read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_output_has_the_rights_of_new_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "b", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "b" / MARKER).stat().st_mode & 0o777 == 0o666 & ~mask


def test_failed_replacement_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "b", "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if (path / "fresh").exists():
            raise OSError("no more")
        return rename(path, target)

    def replaced() -> None:
        with whole_folder(tmp_path / "b", MARKER, force=True) as part:
            (part / "fresh").touch()
            monkeypatch.setattr(Path, "rename", failing)

    with pytest.raises(OutputError, match="what was there before is there still"):
        replaced()
    monkeypatch.undo()
    assert (tmp_path / "b" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_leftovers_of_killed_processes_are_removed(
    tmp_path: Path,
) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from ercbatch.bundle.folders import whole_folder\n"
        "with whole_folder(Path(sys.argv[1]), 'bundle.json'):\n"
        "    print('writing', flush=True)\n    time.sleep(600)"
    )

    def parts() -> list[str]:
        return [path.name for path in tmp_path.iterdir() if path.name.startswith(".b.")]

    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "b"], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        write(tmp_path / "b", "mine")
        assert len(parts()) == 1
        other.send_signal(signal.SIGKILL)
        other.wait()
    write(tmp_path / "b", "again", force=True)
    assert parts() == []
    # Killed between the two renames: the old folder is put back.
    (tmp_path / "b").rename(tmp_path / ".b.ercbatch-part-x.old")
    with pytest.raises(KeyError), whole_folder(tmp_path / "b", MARKER):
        raise KeyError
    assert (tmp_path / "b" / MARKER).read_text() == "again"
    assert parts() == []
