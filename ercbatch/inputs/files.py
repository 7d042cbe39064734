"""Input files: their names, and what they hold, decompressed."""

from __future__ import annotations

import glob
import io
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from ercbatch.errors import InputError, UnreadableError, UsageError

STDIN = "-"
MANIFEST, REJECTS = ".manifest.json", ".rejects.jsonl"
"""What a run writes beside its output is named after it, with these endings."""
_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"
"""After 0x50 to 0x5f: a Zstandard frame that holds no content, as pzstd begins with."""
DAMAGES = (EOFError, zlib.error, zstandard.ZstdError)
"""What reading raises where a compressed file is damaged."""


def expand_inputs(names: Sequence[str], own: Sequence[Path] = ()) -> list[str]:
    """Files, folders (their JSONL files, sorted), glob patterns and `-`, as file names.

    What a labelling run left in a folder, or where a pattern looks (an output with its manifest
    beside it, rejects, and what is the run's `own`), is not input again.

    Raises:
        UsageError: `-` more than once.
        InputError: nothing of that name, or nothing in it.
    """
    if list(names).count(STDIN) > 1:
        raise UsageError("- is given twice, but stdin can be read only once: give it once")
    files: list[str] = []
    for name in names:
        try:
            files += _expand(name, own)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise InputError(f"{name}: {reason}: check the name and its rights") from error
    return files


def _expand(name: str, own: Sequence[Path]) -> list[str]:
    if not name:
        raise InputError("an input has an empty name: is a variable of yours not set?")

    def is_input(path: Path) -> bool:
        return (
            not path.name.endswith(REJECTS)
            and not path.with_name(path.name + MANIFEST).exists()
            and path.is_file()
            and not any(left.exists() and left.samefile(path) for left in own)
        )

    path = Path(name)
    if path.is_dir():
        inside = sorted(str(p) for p in path.iterdir() if p.name.endswith(_ENDINGS) and is_input(p))
        if not inside:
            raise InputError(
                f"{name}: no JSONL file to label in this folder: name the files, or rename them to "
                "*.jsonl (or .jsonl.gz, .jsonl.zst)"
            )
        return inside
    if name == STDIN or path.exists():  # pipes and devices too
        return [name]
    matched = sorted(p for p in glob.glob(name) if is_input(Path(p)))
    if not matched:
        raise InputError(f"{name}: no such file: check the name")
    return matched


def open_input(name: str) -> BinaryIO:
    """A file or stdin (`-`) for reading, decompressed if it is gzip or Zstandard.

    Raises:
        UnreadableError: it cannot be opened.
    """
    try:
        raw = sys.stdin.buffer if name == STDIN else open(name, "rb")  # noqa: SIM115
        # A stand-in for stdin may be no buffered reader; only that one can look ahead.
        plain = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast(Any, raw))
        magic = plain.peek(4)[:4]
        if 0 < len(magic) < 4:  # a pipe brings what its writer has written by now
            magic = plain.read(4)
            plain = io.BufferedReader(_Rejoined(magic, plain))
    except OSError as error:
        raise UnreadableError(
            f"{name}: cannot be read ({error.strerror}): check the name and its rights"
        ) from error
    kind = None
    if magic.startswith(_GZIP):
        kind = "gzip"
    elif magic.startswith(_ZSTD) or (magic[1:] == _SKIPPABLE and magic[0] >> 4 == 5):
        kind = "Zstandard"
    return plain if kind is None else io.BufferedReader(_Decompressed(plain, kind), 1 << 16)


def is_compressed(stream: BinaryIO) -> bool:
    """Whether what comes from an opened input is decompressed."""
    return isinstance(stream, io.BufferedReader) and isinstance(stream.raw, _Decompressed)


def pass_over(stream: BinaryIO, count: int) -> None:
    """Read so many bytes of a stream that has just been opened."""
    if count and stream.seekable():
        stream.seek(count)
        return
    while count:
        piece = stream.read(min(count, 1 << 20))
        if not piece:
            raise EOFError("it has become shorter")
        count -= len(piece)


def shown(name: str) -> str:
    """A file name as text: it need not be UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes have been taken from it."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._head[: len(buffer)] or cast(io.BufferedReader, self._rest).read1(len(buffer))
        self._head = self._head[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._rest.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """What gzip or Zstandard frames hold, one after another.

    Compressed bytes are taken in the same pieces, from the beginning, whatever is read: of a
    damaged one comes nothing, so that what comes before it is always as much. The libraries' own
    readers take other pieces after a seek, or a cut for the end.
    """

    def __init__(self, source: BinaryIO, kind: str) -> None:
        self._source = source
        self._kind = kind
        self._frame = _frame(kind)
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            taken = self._frame.unused_data if self._frame.eof else b""
            taken = taken or self._source.read(_TAKEN)
            if self._frame.eof:
                self._frame, self._begun = _frame(self._kind), False
            if not taken:
                if self._begun:
                    raise EOFError(f"it ends within a {self._kind} frame")
                return 0
            if self._kind == "gzip" and not self._begun:
                taken = taken.lstrip(b"\0")  # tapes fill up with them
            self._begun = self._begun or bool(taken)
            self._ready = memoryview(self._frame.decompress(taken))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


_TAKEN = 512
"""Compressed bytes at a time, which give 16 MiB at most: of Zstandard, 4 bytes can hold 128 KiB."""


def _frame(kind: str) -> Any:
    """What decompresses one frame: of both kinds it has the same methods."""
    if kind == "gzip":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    return zstandard.ZstdDecompressor().decompressobj()
