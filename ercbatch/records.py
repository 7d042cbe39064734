"""JSONL in: files, folders, globs and stdin to dialogues; a bad line costs one line."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import zstandard

from ercbatch.dialogues import Dialogue, parse_dialogue
from ercbatch.errors import InputError, LimitError, RecordError, UsageError

STDIN = "-"
MANIFEST, REJECTS = ".manifest.json", ".rejects.jsonl"
"""What a run writes beside its output is named after it, with these endings."""
_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")
_GZIP, _ZSTD, _BOM = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"
_SKIPPABLE = b"\x2a\x4d\x18"
"""After 0x50 to 0x5f: a Zstandard frame that holds no content, as pzstd begins with."""
_UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"{\x00", b"\x00{")
"""How UTF-16 JSON begins: with its byte order mark, or with the brace of the first line."""
_RAW = 200
"""Characters of a bad line that its reject shows."""
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_DEEPEST = 250
"""Levels of nesting. orjson reads 1,024, but writes only 254."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is taken from an input: beyond, a line is a reject, and a file is given up."""

    line_bytes: int = 16 << 20
    turns: int = 100_000
    characters: int = 1_000_000
    """Of an utterance's text."""
    file_bytes: int = 1 << 40
    """Of a compressed file's content."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Line:
    """Where a line stands: `line` from 1, `byte` its offset in the decompressed file, `end` that of
    the next line."""

    file: str
    line: int
    byte: int
    end: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """A line that is a dialogue."""

    at: Line
    dialogue: Dialogue


@dataclass(frozen=True, slots=True)
class Reject:
    """A line that is none: `code` for programs, `reason` for people, `raw` its beginning."""

    at: Line
    code: str
    reason: str
    raw: str

    def to_record(self) -> dict[str, str | int]:
        """The reject as it is written."""
        return {
            "file": self.at.file,
            "line": self.at.line,
            "byte": self.at.byte,
            "code": self.code,
            "reason": self.reason,
            "raw": self.raw,
        }


@dataclass(slots=True)
class Counts:
    """Lines seen so far. At the end lines = accepted + rejected + blank."""

    lines: int = 0
    accepted: int = 0
    rejected: int = 0
    blank: int = 0


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
        InputError: it cannot be opened.
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
        raise InputError(
            f"{name}: cannot be read ({error.strerror}): check the name and its rights"
        ) from error
    if magic.startswith(_GZIP):
        return cast(BinaryIO, _GzipReader(plain))
    if magic.startswith(_ZSTD) or (magic[1:] == _SKIPPABLE and magic[0] >> 4 == 5):
        return io.BufferedReader(_ZstdReader(plain), 1 << 16)
    return plain


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


class _GzipReader(gzip.GzipFile):
    """Closes the file below it too, which GzipFile leaves to the caller."""

    def __init__(self, source: BinaryIO) -> None:
        super().__init__(fileobj=source)
        self._source = source

    def close(self) -> None:
        super().close()
        self._source.close()


class _ZstdReader(io.RawIOBase):
    """Decompresses Zstandard frames; zstandard's own stream reader is silent on a cut file."""

    _TAKEN = 512
    """Compressed bytes at a time: a block of 4 can hold 128 KiB, so these give 16 MiB at most."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            taken = self._frame.unused_data if self._frame.eof else b""
            taken = taken or self._source.read(self._TAKEN)
            if self._frame.eof:
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
            if not taken:
                if self._begun:
                    raise EOFError("it ends within a Zstandard frame")
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(taken))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def read_records(
    name: str, counts: Counts, limits: Limits = DEFAULT_LIMITS, start: tuple[int, int] = (0, 0)
) -> Iterator[Accepted | Reject]:
    """Every line of an input that is not blank, in order; `counts` is kept up to date.

    Lines are split at \\n only; \\r\\n and a byte order mark at the start are tolerated. A line
    over the limit is skipped without being held in memory. Numbers with a point or an exponent are
    read as 64-bit floats, integers exactly or not at all; of duplicate keys the last one counts.
    The first `start` = (lines, bytes) are passed over.

    Reject codes: encoding, json, number, too_deep, too_long, text_too_long, too_many_turns, and
    those of `parse_dialogue`.

    Raises:
        InputError: the file breaks off, is UTF-16, or a compressed one holds too much.
    """
    # A file name need not be UTF-8, but a reject is.
    shown = "<stdin>" if name == STDIN else os.fsencode(name).decode("utf-8", "replace")
    with open_input(name) as stream:
        number, byte = start
        compressed = not isinstance(stream, io.BufferedReader) or isinstance(
            stream.raw, _ZstdReader
        )
        try:
            _pass_over(stream, byte)
        except _BROKEN as error:
            raise _broken(shown, number, error) from error
        while True:
            try:
                line = stream.readline(limits.line_bytes + 1)
                size = len(line)
                long = size > limits.line_bytes
                if long:
                    most = limits.file_bytes - byte if compressed else None
                    size += 0 if line.endswith(b"\n") else _skip_line(stream, most)
                    line = line[: 4 * _RAW]
            except _BROKEN as error:
                raise _broken(shown, number, error) from error
            if not size:
                return
            number += 1
            at = Line(shown, number, byte, byte + size)
            byte += size
            if compressed and byte > limits.file_bytes:
                raise LimitError(
                    f"{shown}, line {number}: it decompresses to over {limits.file_bytes:,} bytes: "
                    "if it is no bomb, give a higher --max-file-bytes"
                )
            if number == 1:
                if line.startswith(_UTF_16):
                    raise InputError(f"{shown}: UTF-16 text: convert it to UTF-8 (iconv -t UTF-8)")
                line = line.removeprefix(_BOM)
            counts.lines += 1
            if not long and not line.strip():
                counts.blank += 1
                continue
            try:
                if long:
                    raise RecordError("too_long", f"the line has over {limits.line_bytes:,} bytes")
                dialogue = _parse(line, limits)
            except RecordError as error:
                counts.rejected += 1
                raw = line[: 4 * _RAW].decode("utf-8", "replace").rstrip("\r\n")[:_RAW]
                yield Reject(at, error.code, error.reason, raw)
            else:
                counts.accepted += 1
                yield Accepted(at, dialogue)


def read_dialogues(path: Path) -> Iterator[tuple[int, Dialogue]]:
    """(line number, dialogue) of every line of a file in which a bad line is an error.

    Raises:
        InputError: a line is not a dialogue.
    """
    for item in read_records(str(path), Counts()):
        if isinstance(item, Reject):
            raise InputError(f"{path}, line {item.at.line}: {item.reason}: mend or remove the line")
        yield item.at.line, item.dialogue


def dump_record(record: object) -> bytes:
    """A record as a JSON line."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _parse(line: bytes, limits: Limits) -> Dialogue:
    try:
        value = orjson.loads(line.rstrip(b"\r\n"))
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as bad:
            raise RecordError("encoding", f"not UTF-8 at byte {bad.start} of the line") from error
        if "infinity" in error.msg:
            raise RecordError("number", f"a number beyond 64-bit floats: {error}") from error
        raise RecordError("json", f"not JSON: {error}") from error
    if line.count(b"[") + line.count(b"{") > _DEEPEST and _depth_exceeds(value, _DEEPEST):
        raise RecordError("too_deep", f"values nested over {_DEEPEST} levels")
    if _LONG_NUMBER.search(line):
        json.loads(line, parse_int=_check_integer)
    dialogue = replace(parse_dialogue(value), size=len(line))
    if len(dialogue.utterances) > limits.turns:
        raise RecordError("too_many_turns", f"the dialogue has over {limits.turns:,} turns")
    for turn, utterance in enumerate(dialogue.utterances, start=1):
        if len(utterance.text) > limits.characters:
            reason = f"turn {turn}: its text has over {limits.characters:,} characters"
            raise RecordError("text_too_long", reason)
    return dialogue


def _depth_exceeds(value: object, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


_BROKEN = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What reading raises where a file breaks off."""


def _broken(shown: str, number: int, error: Exception) -> InputError:
    if "requires too much memory" in str(error):  # Zstandard's words
        return InputError(f"{shown}: its window is over 128 MiB: compress it again without --long")
    return InputError(
        f"{shown}, after line {number}: the file is broken there ({error}): fetch or compress it "
        "again"
    )


def _pass_over(stream: BinaryIO, count: int) -> None:
    """Read so many bytes of a stream that has just been opened."""
    if count and stream.seekable():
        stream.seek(count)  # compressed ones read on to there
        return
    while count:
        piece = stream.read(min(count, 1 << 20))
        if not piece:
            raise EOFError("it has become shorter")
        count -= len(piece)


def _skip_line(stream: BinaryIO, most: int | None) -> int:
    """Read on to the end of the line, or until so many bytes; the bytes read."""
    skipped = 0
    while piece := stream.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n") or (most is not None and skipped > most):
            break
    return skipped


def _check_integer(digits: str) -> int:
    # orjson turns an integer beyond 64 bits into a float: the user's own field would change.
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 64:
        raise RecordError("number", f"an integer beyond 64 bits ({digits[:24]}…): quote it")
    return int(digits)
