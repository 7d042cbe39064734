"""Output folders: complete or absent, and never in the place of what somebody else has there."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ercbatch.errors import OutputError, UsageError

_PART = ".ercbatch-part-"
"""In the name of a folder that is being written, a hidden one beside the place that it is for."""
_OLD = ".old"
"""Ends the name of the folder that gives way to it."""


def check_output(
    folder: Path, marker: str, *, force: bool, inputs: Iterable[str | Path] = ()
) -> None:
    """See, before any work is done, that a folder may be written.

    Args:
        folder: what is to be written.
        marker: a file that such a folder holds.
        force: replace such a folder; nothing else is ever replaced.
        inputs: paths that are read meanwhile, as far as they exist.

    Raises:
        UsageError: it may not; the message says why.
    """
    try:
        target = folder.resolve()
        for source in map(Path, inputs):
            resolved = source.resolve()
            if source.exists() and (resolved == target or target in resolved.parents):
                raise UsageError(f"{folder}: {source} is read from there: choose another place")
        if target.exists():
            if not target.is_dir():
                raise UsageError(f"{folder} is not a folder: choose another place")
            if any(target.iterdir()):
                if not force:
                    raise UsageError(f"{folder} exists: choose another folder, or give --force")
                if not (target / marker).is_file():
                    raise UsageError(
                        f"{folder} has no {marker}: --force replaces only what such a command "
                        "wrote: choose another place, or remove it yourself"
                    )
        parent = next(path for path in target.parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{folder}: nothing can be written to {parent}: choose another place")
    except OSError as error:  # a name that is too long, say
        raise UsageError(f"{folder}: {error.strerror}: choose another place") from error


@contextmanager
def whole_folder(folder: Path, marker: str, *, force: bool = False) -> Iterator[Path]:
    """A folder to write files into, which appears as `folder` when all is written, or not at all.

    What a killed process left of an earlier one is removed. See `check_output`.

    Raises:
        UsageError: `folder` may not be written.
        OutputError: it cannot be written.
    """
    check_output(folder, marker, force=force)
    target = folder.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PART}", dir=target.parent))
        lock = _open_locked(part)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        yield part
        _settle(part)
        _put(part, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder}: cannot be written: {error}: what was there before is there still; make "
            "room, or choose another place"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # it is there no more if all went well
        os.close(lock)


def _settle(part: Path) -> None:
    """Bring the files of a folder to the disk, with the rights that new files have."""
    mask = os.umask(0)
    os.umask(mask)
    for path in part.iterdir():
        path.chmod(0o666 & ~mask)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    part.chmod(0o777 & ~mask)


def _put(part: Path, target: Path) -> None:
    old = part.with_name(part.name + _OLD)
    try:
        if target.exists():
            target.rename(old)
        part.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what killed processes left; put back what one had moved away at its last."""
    names = glob.glob(f".{glob.escape(target.name)}{_PART}*", root_dir=target.parent)
    for path in (target.parent / name for name in sorted(names)):
        if path.name.endswith(_OLD) and not target.exists():
            path.rename(target)
            continue
        try:
            lock = _open_locked(path)
        except OSError:
            continue  # somebody is writing it
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _open_locked(folder: Path) -> int:
    """The descriptor of a folder that is locked until it is closed, or its process has ended.

    Raises:
        OSError: another process has locked it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
