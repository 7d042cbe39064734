"""The journal beside a run's output: how far the output is whole, and where to go on from there.

OUT.journal has one JSON object a line. The first says what the run is: its inputs, bundle, options
and releases; a run that goes on must be the same. Every other is a commit: so many bytes of the
outputs are on the disk and hold the answers to all of the input up to some line. The last one of a
run that is done holds the manifest. Each line ends with a digest of itself: one that was cut off or
altered counts for nothing, nor does anything after it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from ercbatch.checked import integer, mapping, number, string
from ercbatch.errors import UsageError
from ercbatch.inputs.records import BEGINNING, Position
from ercbatch.runs.appended import APPEND_FLAGS, Prefix, lock, named_errors, sync_folder, write_all

FORMAT = 4
_CHECK = b',"check":"'
_CHECK_DIGITS = 16
"""Hexadecimal digits of a line's digest that are written."""
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Counts:
    """Lines of the inputs, and utterances labelled.

    At the end of a run, lines = labelled + rejected + blank.
    """

    lines: int = 0
    labelled: int = 0
    rejected: int = 0
    blank: int = 0
    utterances: int = 0

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read counts.

        Raises:
            KeyError, TypeError, ValueError: they are none.
        """
        return cls(**_integers(cls.__slots__, value))


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """How far a run has come, and where a resumed run begins to read.

    Attributes:
        chunk_start: where reading begins, the start of a chunk (see `ercbatch.engine`).
        written: records from there on that are in the output or among the rejects.
        counts: counts up to and with the last of these records.
        seconds: duration of labelling up to here.
    """

    chunk_start: Position = BEGINNING
    written: int = 0
    counts: Counts = Counts()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Commit:
    """A resume point, and what is on the disk of the output and the rejects there."""

    point: ResumePoint
    output: Prefix
    rejects: Prefix

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read a commit.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        point = mapping(value["point"])
        return cls(
            ResumePoint(
                Position(**_integers(Position.__slots__, point["chunk_start"])),
                integer(point["written"], high=_INT64_MAX),
                Counts.from_json(point["counts"]),
                number(point["seconds"]),
            ),
            _prefix(value["output"]),
            _prefix(value["rejects"]),
        )


def _prefix(value: object) -> Prefix:
    values = mapping(value)
    return Prefix(integer(values["bytes"], high=_INT64_MAX), string(values["sha256"]))


def _integers(names: Iterable[str], value: object) -> dict[str, int]:
    return {name: integer(mapping(value)[name], high=_INT64_MAX) for name in names}


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
        self._file = _open_locked(path)
        try:
            self._end = self._read()
            self.foreign = self.identity is None and os.fstat(self._file).st_size > 0
        except OSError as error:
            os.close(self._file)
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error

    @property
    def has_run(self) -> bool:
        """Whether the journal is of a run, which is then not complete."""
        return self.identity is not None

    def _read(self) -> int:
        """Take in all whole lines; where they end."""
        end = 0
        with open(self._file, "rb", closefd=False) as lines:
            for line in lines:
                try:
                    self._take(_from_line(line))
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
        sync_folder(self.path.parent)

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
        line = _to_line(value)
        with named_errors(self.path):
            os.ftruncate(self._file, self._end)  # what a run that died had begun to write
            os.lseek(self._file, self._end, os.SEEK_SET)
            try:
                write_all(self._file, line)
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


def _open_locked(path: Path) -> int:
    while True:
        try:
            file = os.open(path, APPEND_FLAGS, 0o666)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written: {error.strerror}: choose another --output"
            ) from error
        try:
            lock(file, path)
            # The run that held it may have been over, and have removed it, just now.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _to_line(value: Mapping[str, Any]) -> bytes:
    body = orjson.dumps(value)[:-1]
    return body + _line_end(body)


def _from_line(line: bytes) -> dict[str, Any]:
    """What a line says.

    Raises:
        ValueError: it is not as it was written.
    """
    body = line[: line.rfind(_CHECK)]
    if body + _line_end(body) != line:
        raise ValueError("the digest of a line is another")
    value: dict[str, Any] = orjson.loads(body + b"}")
    return value


def _line_end(body: bytes) -> bytes:
    return _CHECK + hashlib.sha256(body).hexdigest()[:_CHECK_DIGITS].encode() + b'"}\n'
