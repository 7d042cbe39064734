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
MANIFEST_ENDING, REJECTS_ENDING = ".manifest.json", ".rejects.jsonl"
"""What a run writes beside its output is named after it, with these endings."""
PLAIN_ENDINGS = (".jsonl", ".ndjson")
_ENDINGS = tuple(e + packed for packed in ("", ".gz", ".zst") for e in PLAIN_ENDINGS)
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"
"""After 0x50 to 0x5f: a Zstandard frame that holds no content, as pzstd begins with."""
DAMAGE_ERRORS = (EOFError, zlib.error, zstandard.ZstdError)
"""What reading raises where a compressed file is damaged."""


def expand_inputs(names: Sequence[str], outputs: Sequence[Path] = ()) -> list[str]:
    """Files, folders (their JSONL files, sorted), glob patterns and `-`, as file names.

    What a labelling run left in a folder, or where a pattern looks (an output with its manifest
    beside it, rejects, and the run's own `outputs`), is not input again.

    Raises:
        UsageError: `-` more than once.
        InputError: nothing of that name, or nothing in it.
    """
    if list(names).count(STDIN) > 1:
        raise UsageError("- is given twice, but stdin can be read only once: give it once")
    files: list[str] = []
    for name in names:
        try:
            files += _expand(name, outputs)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise InputError(f"{name}: {reason}: check the name and its rights") from error
    return files


def _expand(name: str, outputs: Sequence[Path]) -> list[str]:
    if not name:
        raise InputError("an input has an empty name: is a variable of yours not set?")

    def is_input(path: Path) -> bool:
        return (
            not path.name.endswith(REJECTS_ENDING)
            and not path.with_name(path.name + MANIFEST_ENDING).exists()
            and path.is_file()
            and not any(output.exists() and output.samefile(path) for output in outputs)
        )

    path = Path(name)
    if path.is_dir():
        names = sorted(str(p) for p in path.iterdir() if p.name.endswith(_ENDINGS) and is_input(p))
        if not names:
            raise InputError(
                f"{name}: no JSONL file to label in this folder: name the files, or rename them to "
                "*.jsonl (or .jsonl.gz, .jsonl.zst)"
            )
        return names
    if name == STDIN or path.exists():  # pipes and devices too
        return [name]
    names = sorted(p for p in glob.glob(name) if is_input(Path(p)))
    if not names:
        raise InputError(f"{name}: no such file: check the name")
    return names


def open_input(name: str) -> BinaryIO:
    """A file or stdin (`-`) for reading, decompressed if it is gzip or Zstandard.

    Raises:
        UnreadableError: it cannot be opened.
    """
    try:
        raw = sys.stdin.buffer if name == STDIN else open(name, "rb")  # noqa: SIM115
        # A stand-in for stdin may be no buffered reader; only that one can look ahead.
        stream = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast(Any, raw))
        magic = stream.peek(4)[:4]
        if 0 < len(magic) < 4:  # a pipe brings what its writer has written by now
            magic = stream.read(4)
            stream = io.BufferedReader(_PeekedStream(magic, stream))
    except OSError as error:
        raise UnreadableError(
            f"{name}: cannot be read ({error.strerror}): check the name and its rights"
        ) from error
    kind = None
    if magic.startswith(_GZIP):
        kind = "gzip"
    elif magic.startswith(_ZSTD) or (magic[1:] == _SKIPPABLE and magic[0] >> 4 == 5):
        kind = "Zstandard"
    return stream if kind is None else io.BufferedReader(_DecompressedStream(stream, kind), 1 << 16)


def is_compressed(stream: BinaryIO) -> bool:
    """Whether what comes from an opened input is decompressed."""
    return isinstance(stream, io.BufferedReader) and isinstance(stream.raw, _DecompressedStream)


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


def decode_name(name: str) -> str:
    """A file name as text: it need not be UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


class _PeekedStream(io.RawIOBase):
    """A stream whose first bytes have been taken from it."""

    def __init__(self, head: bytes, tail: BinaryIO) -> None:
        self._head, self._tail = head, tail

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._head[: len(buffer)] or cast(io.BufferedReader, self._tail).read1(len(buffer))
        self._head = self._head[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._tail.close()
        super().close()


class _DecompressedStream(io.RawIOBase):
    """What gzip or Zstandard frames hold, one after another.

    Compressed bytes are taken in the same pieces, from the beginning, whatever is read: of a
    damaged one comes nothing, so that what comes before it is always as much. The libraries' own
    readers take other pieces after a seek, or a cut for the end.
    """

    def __init__(self, source: BinaryIO, kind: str) -> None:
        self._source = source
        self._kind = kind
        self._frame = _frame(kind)
        self._in_frame = False
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            compressed = self._frame.unused_data if self._frame.eof else b""
            compressed = compressed or self._source.read(_PIECE_BYTES)
            if self._frame.eof:
                self._frame, self._in_frame = _frame(self._kind), False
            if not compressed:
                if self._in_frame:
                    raise EOFError(f"it ends within a {self._kind} frame")
                return 0
            if self._kind == "gzip" and not self._in_frame:
                compressed = compressed.lstrip(b"\0")  # tapes fill up with them
            self._in_frame = self._in_frame or bool(compressed)
            self._decompressed = memoryview(self._frame.decompress(compressed))
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


_PIECE_BYTES = 512
"""Compressed bytes at a time, which give 16 MiB at most: of Zstandard, 4 bytes can hold 128 KiB."""


def _frame(kind: str) -> Any:
    """What decompresses one frame: of both kinds it has the same methods."""
    if kind == "gzip":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    return zstandard.ZstdDecompressor().decompressobj()
