"""The journal beside a run's output: how far the output is whole, and where to go on from there.

OUT.journal has one JSON object a line. The first says what the run is: its inputs, bundle, options
and releases; a run that goes on must be the same. Every other is a commit: so many bytes of the
outputs are on the disk and hold the answers to all of the input up to some line. The last one of a
run that is done holds the manifest. Each line ends with a digest of itself: one that was cut off or
altered counts for nothing, nor does anything after it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from ercbatch.checked import integer, mapping, number, string
from ercbatch.errors import OutputError, UsageError

FORMAT = 3
_CHECK = b',"check":"'
_DIGITS = 16
"""Hexadecimal digits of a line's digest that are written."""
_MOST = 2**63 - 1
_TO_ADD = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Place:
    """A point between two lines of the inputs.

    `source` is the index of an input; `line` and `byte` (decompressed) of it lie before the point.
    `lines` and `blank` are those of all inputs that do.
    """

    source: int
    line: int
    byte: int
    lines: int
    blank: int

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The place that was written so.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        told = mapping(value)
        counts = (integer(told[key], high=_MOST) for key in cls.__slots__)
        return cls(*counts)


BEGINNING = Place(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Commit:
    """What is on the disk, and where a run that goes on begins to read.

    Reading begins at `restart`; the first `replayed` items (dialogues and rejects) and `trees` from
    there are computed no more: see `pipeline.Restart`.
    """

    restart: Place
    replayed: int
    trees: int
    output: int
    """Bytes."""
    rejects: int
    """Bytes."""
    sha256: str
    """Of so much of the output."""
    rejects_sha256: str
    labelled: int
    rejected: int
    utterances: int
    seconds: float
    """Of labelling so far."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The commit that was written so.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        counts = ("replayed", "trees", "output", "rejects", "labelled", "rejected", "utterances")
        return cls(
            restart=Place.from_json(value["restart"]),
            sha256=string(value["sha256"]),
            rejects_sha256=string(value["rejects_sha256"]),
            seconds=number(value["seconds"]),
            **{key: integer(value[key], high=_MOST) for key in counts},
        )


class Journal:
    """An open journal, locked: one run at a time writes to an output.

    `identity` is what the run was that wrote it (None where it got no further than to make it),
    `commit` its last one, and `manifest` that of a run that was done. `foreign` says that it holds
    something, and no run: it is somebody else's, or its beginning was altered.

    Raises:
        UsageError: another run holds it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity: dict[str, Any] | None = None
        self.commit: Commit | None = None
        self.manifest: dict[str, Any] | None = None
        self._file = _locked(path)
        try:
            self._end = self._read()
            self.foreign = self.identity is None and os.fstat(self._file).st_size > 0
        except OSError as error:
            os.close(self._file)
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error

    def _read(self) -> int:
        """Take in all whole lines; where they end."""
        end = 0
        with open(self._file, "rb", closefd=False) as lines:
            for line in lines:
                try:
                    self._take(_value(line))
                except (KeyError, TypeError, ValueError):
                    break
                end += len(line)
        return end

    def _take(self, value: Mapping[str, Any]) -> None:
        if self.identity is None:
            self.identity = dict(value)
        elif "manifest" in value:
            self.manifest = dict(mapping(value["manifest"]))
        else:
            self.commit = Commit.from_json(value)

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Forget what was written, if anything, and say what the run is.

        Raises:
            OSError: it cannot be written.
        """
        self.foreign = False
        self.identity, self.commit, self.manifest, self._end = dict(identity), None, None, 0
        self._append(identity)
        _sync_folder(self.path.parent)

    def write(self, commit: Commit) -> None:
        """Bring a commit to the disk; what it speaks of must be there.

        Raises:
            OSError: it cannot be written.
        """
        self._append(asdict(commit))
        self.commit = commit

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Say that the run is done.

        Raises:
            OSError: it cannot be written.
        """
        self._append({"manifest": manifest})
        self.manifest = dict(manifest)

    def _append(self, value: Mapping[str, Any]) -> None:
        line = _line(value)
        with _told(self.path):
            os.ftruncate(self._file, self._end)  # what a run that died had begun to write
            os.lseek(self._file, self._end, os.SEEK_SET)
            try:
                _write(self._file, line)
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
            os.fsync(self._file)
        self._end += len(line)

    def remove(self) -> None:
        """Remove it: its run is over."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let others have it; an empty one is removed."""
        if self.identity is None and not self.foreign:
            with suppress(OSError):
                self.path.unlink()
        os.close(self._file)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of calls that know a file by its number alone name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _write(file: int, data: bytes | bytearray) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


class Appended:
    """A file that a run adds to: what is written up to a commit stays, what comes after may not.
    It is locked: no other run adds to it.

    Args:
        path: of the file.
        length: bytes of it to keep.
        sha256: their digest; None where nothing is to be kept.

    Raises:
        OSError: it cannot be read or cut.
        OutputError: it does not begin so.
        UsageError: it cannot be opened, or another run writes to it.
    """

    _GATHERED = 1 << 20
    """Bytes that are written at a time."""

    def __init__(self, path: Path, length: int, sha256: str | None) -> None:
        self.path = path
        self.length = length
        self.sha256 = hashlib.sha256()
        self._gathered = bytearray()
        try:
            self._file = os.open(path, _TO_ADD, 0o666)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written: {error.strerror}: choose another file"
            ) from error
        try:
            with _told(path):
                _lock(self._file, path)
                self._keep(length)
                if sha256 not in (None, self.sha256.hexdigest()):
                    raise OutputError(
                        f"{path}: it is not what its journal says: begin again with --force"
                    )
                os.ftruncate(self._file, length)
                os.lseek(self._file, length, os.SEEK_SET)
        except BaseException:
            os.close(self._file)
            raise

    def _keep(self, length: int) -> None:
        with open(self._file, "rb", closefd=False) as kept:
            while length:
                piece = kept.read(min(length, self._GATHERED))
                if not piece:
                    raise OutputError(
                        f"{self.path}: it is shorter than its journal says: begin again with "
                        "--force"
                    )
                self.sha256.update(piece)
                length -= len(piece)

    def add(self, data: bytes) -> None:
        """Add some bytes.

        Raises:
            OSError: they cannot be written.
        """
        self._gathered += data
        self.sha256.update(data)
        self.length += len(data)
        if len(self._gathered) >= self._GATHERED:
            self.flush()

    def flush(self) -> None:
        """Hand all of it to the system.

        Raises:
            OSError: it cannot be written.
        """
        with _told(self.path):
            _write(self._file, self._gathered)
        self._gathered = bytearray()

    def settle(self) -> None:
        """Bring what is flushed to the disk.

        Raises:
            OSError: it cannot be.
            OutputError: the file is no longer in its place.
        """
        with _told(self.path):
            os.fsync(self._file)
        try:
            same = os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            same = False
        if self.length and not same:
            raise OutputError(f"{self.path}: somebody has moved or removed it: begin again")

    def close(self) -> None:
        """Close it; what is not settled may be lost."""
        os.close(self._file)


def differences(was: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> list[str]:
    """What differs between two such values: `name: old, now new` for each."""
    found: list[str] = []
    for key in [*was, *(key for key in now if key not in was)]:
        old, new = was.get(key), now.get(key)
        name = f"{under}{key}"
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            names = [_entry(place, value) for place, value in enumerate(old, start=1)]
            old, new = dict(zip(names, old, strict=True)), dict(zip(names, new, strict=True))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name}: {_said(old)}, now {_said(new)}")
    return found


def put_in_place(part: Path, whole: Path) -> None:
    """Rename a complete file, and bring the new name to the disk.

    What is replaced hands on who may read it.

    Raises:
        OSError: it cannot be.
    """
    with suppress(FileNotFoundError):
        shutil.copymode(whole, part)
    os.replace(part, whole)
    _sync_folder(whole.parent)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # one may write there, and not look
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(place: int, value: object) -> str:
    file = value.get("file") if isinstance(value, Mapping) else None
    return f"{place} ({file})" if file else str(place)


def _said(value: object) -> str:
    if value is None:
        return "missing"
    # Lists may be long, or lie deep inside each other.
    return str(value) if isinstance(value, str | int | float) else reprlib.repr(value)


def _locked(path: Path) -> int:
    while True:
        try:
            file = os.open(path, _TO_ADD, 0o666)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written: {error.strerror}: choose another --output"
            ) from error
        try:
            _lock(file, path)
            # The run that held it may have been over, and have removed it, just now.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{path}: another run is writing there: wait for it, or choose another file"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be locked: {error.strerror}") from error


def _line(value: Mapping[str, Any]) -> bytes:
    body = orjson.dumps(value)[:-1]
    return body + _end(body)


def _value(line: bytes) -> dict[str, Any]:
    """What a line says.

    Raises:
        ValueError: it is not as it was written.
    """
    body = line[: line.rfind(_CHECK)]
    if body + _end(body) != line:
        raise ValueError("the digest of a line is another")
    value: dict[str, Any] = orjson.loads(body + b"}")
    return value


def _end(body: bytes) -> bytes:
    return _CHECK + hashlib.sha256(body).hexdigest()[:_DIGITS].encode() + b'"}\n'
