"""Files that a run writes: appended to behind a lock, and put in place when they are complete."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ercbatch.errors import OutputError, UsageError

APPEND_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
"""Flags of a file that is added to; a link in its place is an error."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first bytes of a file, and their SHA-256."""

    bytes: int
    sha256: str


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Errors of calls that know a file by its number alone name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_all(file: int, data: bytes | bytearray) -> None:
    """Write all of the data, in as many calls as it takes."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[os.write(file, remaining) :]


class AppendedFile:
    """A file that a run appends to, locked against other runs.

    Bytes up to a commit stay. Bytes after it may be lost.

    Args:
        path: of the file.
        prefix: the beginning of it that stays; None to begin an empty file.

    Raises:
        OSError: it cannot be read or cut.
        OutputError: it does not begin so.
        UsageError: it cannot be opened, or another run writes to it.
    """

    _BUFFER_BYTES = 1 << 20
    """Bytes that are written at a time."""

    def __init__(self, path: Path, prefix: Prefix | None = None) -> None:
        self.path = path
        self._length = prefix.bytes if prefix is not None else 0
        self._sha256 = hashlib.sha256()
        self._buffer = bytearray()
        try:
            self._file = os.open(path, APPEND_FLAGS, 0o666)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written: {error.strerror}: choose another file"
            ) from error
        try:
            with named_errors(path):
                lock(self._file, path)
                self._hash_prefix(self._length)
                if prefix not in (None, self.written()):
                    raise OutputError(
                        f"{path}: it is not what its journal says: begin again with --force"
                    )
                os.ftruncate(self._file, self._length)
                os.lseek(self._file, self._length, os.SEEK_SET)
        except BaseException:
            os.close(self._file)
            raise

    def written(self) -> Prefix:
        """All of the file up to now, flushed or not."""
        return Prefix(self._length, self._sha256.hexdigest())

    def _hash_prefix(self, length: int) -> None:
        with open(self._file, "rb", closefd=False) as file:
            while length:
                piece = file.read(min(length, self._BUFFER_BYTES))
                if not piece:
                    raise OutputError(
                        f"{self.path}: it is shorter than its journal says: begin again with "
                        "--force"
                    )
                self._sha256.update(piece)
                length -= len(piece)

    def add(self, data: bytes) -> None:
        """Add some bytes.

        Raises:
            OSError: they cannot be written.
        """
        self._buffer += data
        self._sha256.update(data)
        self._length += len(data)
        if len(self._buffer) >= self._BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand all of it to the system.

        Raises:
            OSError: it cannot be written.
        """
        with named_errors(self.path):
            write_all(self._file, self._buffer)
        self._buffer = bytearray()

    def settle(self) -> None:
        """Bring what is flushed to the disk.

        Raises:
            OSError: it cannot be.
            OutputError: the file is no longer in its place.
        """
        with named_errors(self.path):
            os.fsync(self._file)
        try:
            in_place = os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            in_place = False
        if self._length and not in_place:
            raise OutputError(f"{self.path}: somebody has moved or removed it: begin again")

    def close(self) -> None:
        """Close it; what is not settled may be lost."""
        os.close(self._file)


def put_in_place(part: Path, target: Path) -> None:
    """Rename a complete file, and bring the new name to the disk.

    What is replaced hands on who may read it.

    Raises:
        OSError: it cannot be.
    """
    with suppress(FileNotFoundError):
        shutil.copymode(target, part)
    os.replace(part, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Bring new names in a folder to the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # one may write there, and not look
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: int, path: Path) -> None:
    """Lock an open file.

    Raises:
        UsageError: another run has locked it, or it cannot be locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{path}: another run is writing there: wait for it, or choose another file"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be locked: {error.strerror}") from error
