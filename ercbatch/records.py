"""JSONL in: files, folders, globs and stdin to dialogues; a bad line costs one line."""

from __future__ import annotations

import glob
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
from ercbatch.errors import InputError, RecordError, UnreadableError, UsageError

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
_ENDS_FILE = ("broken", "file_too_large", "utf_16")
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_DEEPEST = 250
"""Levels of nesting. orjson reads 1,024, but writes only 254."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is taken from an input; what is beyond is a reject."""

    line_bytes: int = 16 << 20
    turns: int = 100_000
    characters: int = 1_000_000
    """Of an utterance's text."""
    file_bytes: int = 1 << 40
    """Of a compressed file's content, whose rest is one reject."""


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

    @property
    def ends_file(self) -> bool:
        """Whether it stands for all that follows in its file, too."""
        return self.code in _ENDS_FILE

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


def read_records(
    name: str, counts: Counts, limits: Limits = DEFAULT_LIMITS, start: tuple[int, int] = (0, 0)
) -> Iterator[Accepted | Reject]:
    """Every line of an input that is not blank, in order; `counts` is kept up to date.

    Lines are split at \\n only; \\r\\n and a byte order mark at the start are tolerated. A line
    over the limit is skipped without being held in memory. Numbers with a point or an exponent are
    read as 64-bit floats, integers exactly or not at all; of duplicate keys the last one counts.
    The first `start` = (lines, bytes) are passed over.

    Reject codes: encoding, json, number, too_deep, too_long, text_too_long, too_many_turns, those
    of `parse_dialogue`; and, with all that follows in the file, broken (compressed, and damaged
    there), file_too_large and utf_16.

    Raises:
        InputError: the file cannot be opened, or read on (UnreadableError).
    """
    told = "<stdin>" if name == STDIN else shown(name)
    with open_input(name) as stream:
        number, byte = start
        try:
            _pass_over(stream, byte)
        except (*_DAMAGES, OSError) as error:
            raise UnreadableError(f"{told}: cannot be read on: {error}: see to it") from error
        while True:
            try:
                line, size = _read_line(stream, limits, byte)
            except RecordError as error:
                counts.lines += 1
                counts.rejected += 1
                yield Reject(Line(told, number + 1, byte, byte), error.code, error.reason, "")
                return
            except OSError as error:
                raise UnreadableError(
                    f"{told}, after line {number}: cannot be read on ({error.strerror}): see to it"
                ) from error
            if not size:
                return
            number += 1
            at = Line(told, number, byte, byte + size)
            byte += size
            counts.lines += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if size <= limits.line_bytes and not line.strip():
                counts.blank += 1
                continue
            try:
                if number == 1 and line.startswith(_UTF_16):
                    raise RecordError("utf_16", "UTF-16 text: convert it (iconv -t UTF-8)")
                if size > limits.line_bytes:
                    raise RecordError("too_long", f"the line has over {limits.line_bytes:,} bytes")
                dialogue = _parse(line, limits)
            except RecordError as error:
                counts.rejected += 1
                raw = line[: 4 * _RAW].decode("utf-8", "replace").rstrip("\r\n")[:_RAW]
                reject = Reject(at, error.code, error.reason, raw)
                yield reject
                if reject.ends_file:
                    return
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
            mend = "" if item.ends_file else ": mend or remove the line"  # its reason says how
            raise InputError(f"{path}, line {item.at.line}: {item.reason}{mend}")
        yield item.at.line, item.dialogue


def shown(name: str) -> str:
    """A file name as text: it need not be UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


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
    if _LONG_NUMBER.search(line) and _has_large_float(value):
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


_DAMAGES = (EOFError, zlib.error, zstandard.ZstdError)
"""What reading raises where a compressed file is damaged."""


def _read_line(stream: BinaryIO, limits: Limits, byte: int) -> tuple[bytes, int]:
    """The line that begins at `byte`, or the beginning of one that is too long, and its size.

    Raises:
        RecordError: nothing after here can be read.
        OSError: the disk, or the network, gives no more.
    """
    most = limits.file_bytes - byte if _is_compressed(stream) else None
    try:
        line = stream.readline(limits.line_bytes + 1)
        size = len(line)
        if size > limits.line_bytes:
            size += 0 if line.endswith(b"\n") else _skip_line(stream, most)
            line = line[: 4 * _RAW]
    except _DAMAGES as error:
        reason = f"the file is broken from here on ({error}): fetch or compress it again"
        if "requires too much memory" in str(error):  # Zstandard's words
            reason = "the file's window is over 128 MiB: compress it again without --long"
        raise RecordError("broken", reason) from error
    if most is not None and size > most:
        raise RecordError(
            "file_too_large",
            f"the file decompresses to over {limits.file_bytes:,} bytes: if it is no bomb, give a "
            "higher --max-file-bytes",
        )
    return line, size


def _is_compressed(stream: BinaryIO) -> bool:
    return isinstance(stream, io.BufferedReader) and isinstance(stream.raw, _Decompressed)


def _pass_over(stream: BinaryIO, count: int) -> None:
    """Read so many bytes of a stream that has just been opened."""
    if count and stream.seekable():
        stream.seek(count)
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


def _has_large_float(value: object) -> bool:
    """Whether a float in a JSON value may stand for an integer beyond 64 bits."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, float) and abs(inner) >= 1 << 63:
            return True
        if isinstance(inner, dict | list):
            waiting += inner.values() if isinstance(inner, dict) else inner
    return False


def _check_integer(digits: str) -> int:
    # orjson turns an integer beyond 64 bits into a float: the user's own field would change.
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 64:
        raise RecordError("number", f"an integer beyond 64 bits ({digits[:24]}…): quote it")
    return int(digits)
