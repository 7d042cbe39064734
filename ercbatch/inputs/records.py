"""JSONL in: the lines of an input to dialogues; a bad line costs one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import orjson

from ercbatch.dialogues import Dialogue, parse_dialogue
from ercbatch.errors import InputError, RecordError, UnreadableError
from ercbatch.inputs.files import (
    DAMAGE_ERRORS,
    STDIN,
    decode_name,
    is_compressed,
    open_input,
    pass_over,
)

_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"{\x00", b"\x00{")
"""How UTF-16 JSON begins: with its byte order mark, or with the brace of the first line."""
_RAW = 200
"""Characters of a bad line that its reject shows."""
_FILE_ENDING_CODES = ("broken", "file_too_large", "utf_16")
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_MAX_DEPTH = 250
"""Levels of nesting. orjson reads 1,024, but writes only 254."""


@dataclass(frozen=True, slots=True)
class InputLimits:
    """How much is taken from an input; what is beyond is a reject."""

    line_bytes: int = 16 << 20
    turns: int = 100_000
    characters: int = 1_000_000
    """Of an utterance's text."""
    file_bytes: int = 1 << 40
    """Of a compressed file's content, whose rest is one reject."""


DEFAULT_LIMITS = InputLimits()


@dataclass(frozen=True, slots=True)
class Position:
    """A point between two lines of the inputs.

    Attributes:
        source: index of the input.
        line: lines of that input before the point.
        byte: its bytes before the point, decompressed.
        lines: lines of all inputs before the point.
        blank: how many of these are blank.
    """

    source: int = 0
    line: int = 0
    byte: int = 0
    lines: int = 0
    blank: int = 0

    def after(self, size: int, *, blank: bool = False) -> Position:
        """The end of a line of `size` bytes that begins here."""
        byte, blanks = self.byte + size, self.blank + blank
        return Position(self.source, self.line + 1, byte, self.lines + 1, blanks)


BEGINNING = Position()


@dataclass(frozen=True, slots=True)
class Reject:
    """An input line that is not a dialogue.

    Attributes:
        line: its number in the file, from 1.
        byte: its offset in the decompressed file.
        code: the reason in a word, for programs.
        reason: the reason in a sentence, for people.
        raw: the beginning of the line.
    """

    file: str
    line: int
    byte: int
    code: str
    reason: str
    raw: str

    @property
    def ends_file(self) -> bool:
        """Whether the rest of its file cannot be read either."""
        return self.code in _FILE_ENDING_CODES


@dataclass(frozen=True, slots=True)
class Record:
    """A line of the inputs that is not blank: a dialogue, or else a reject."""

    start: Position
    end: Position
    dialogue: Dialogue | None
    reject: Reject | None = None


class Reader:
    """The records of several inputs, in order.

    Lines end with a line feed. A carriage return before it and a byte order mark at the start are
    tolerated. A line over the limit is skipped without being held in memory. Numbers with a point
    or an exponent are read as 64-bit floats, integers exactly or not at all. Of duplicate keys the
    last one counts.

    Reject codes: encoding, json, number, too_deep, too_long, text_too_long, too_many_turns, those
    of `parse_dialogue`; and, with all that follows in the file, broken (compressed, and damaged
    there), file_too_large and utf_16.

    Attributes:
        position: the end of what has been read so far, blank lines included.

    Raises, while it is iterated:
        InputError: a file cannot be opened, or read on (UnreadableError).
    """

    def __init__(
        self,
        names: Sequence[str],
        limits: InputLimits = DEFAULT_LIMITS,
        start: Position = BEGINNING,
    ) -> None:
        self._names = names
        self._limits = limits
        self.position = start

    def __iter__(self) -> Iterator[Record]:
        for source in range(self.position.source, len(self._names)):
            if source > self.position.source:
                self.position = replace(self.position, source=source, line=0, byte=0)
            yield from self._read_input(self._names[source])

    def _read_input(self, name: str) -> Iterator[Record]:
        file = "<stdin>" if name == STDIN else decode_name(name)
        with open_input(name) as stream:
            try:
                pass_over(stream, self.position.byte)
            except (*DAMAGE_ERRORS, OSError) as error:
                raise UnreadableError(f"{file}: cannot be read on: {error}: see to it") from error
            while True:
                start = self.position
                line = b""
                try:
                    line, size = _read_line(stream, self._limits, start.byte)
                    if not size:
                        return
                    if start.line == 0:
                        line = line.removeprefix(_BOM)
                    blank = size <= self._limits.line_bytes and not line.strip()
                    self.position = start.after(size, blank=blank)
                    if blank:
                        continue
                    record = Record(start, self.position, self._parse_line(line, size, start))
                except RecordError as error:
                    if self.position == start:  # the line cannot be read
                        self.position = start.after(0)
                    raw = line[: 4 * _RAW].decode("utf-8", "replace").rstrip("\r\n")[:_RAW]
                    place = (file, start.line + 1, start.byte)
                    reject = Reject(*place, error.code, error.reason, raw)
                    record = Record(start, self.position, None, reject)
                except OSError as error:
                    raise UnreadableError(
                        f"{file}, after line {start.line}: cannot be read on ({error.strerror}): "
                        "see to it"
                    ) from error
                yield record
                if record.reject is not None and record.reject.ends_file:
                    return

    def _parse_line(self, line: bytes, size: int, start: Position) -> Dialogue:
        if start.line == 0 and line.startswith(_UTF_16):
            raise RecordError("utf_16", "UTF-16 text: convert it (iconv -t UTF-8)")
        if size > self._limits.line_bytes:
            reason = f"the line has over {self._limits.line_bytes:,} bytes"
            raise RecordError("too_long", reason)
        dialogue = replace(parse_dialogue(_parse_json(line)), size=len(line))
        _check_limits(dialogue, self._limits)
        return dialogue


def read_dialogues(path: Path) -> Iterator[tuple[int, Dialogue]]:
    """(line number, dialogue) of every line of a file in which a bad line is an error.

    Raises:
        InputError: a line is not a dialogue.
    """
    for record in Reader([str(path)]):
        if record.reject is not None:
            # The reason of a reject that ends its file says what to do.
            advice = "" if record.reject.ends_file else ": mend or remove the line"
            raise InputError(f"{path}, line {record.reject.line}: {record.reject.reason}{advice}")
        assert record.dialogue is not None
        yield record.end.line, record.dialogue


def dump_line(record: object) -> bytes:
    """A record as a JSON line."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _parse_json(line: bytes) -> object:
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
    if line.count(b"[") + line.count(b"{") > _MAX_DEPTH and _depth_exceeds(value, _MAX_DEPTH):
        raise RecordError("too_deep", f"values nested over {_MAX_DEPTH} levels")
    if _LONG_NUMBER.search(line) and _has_large_float(value):
        json.loads(line, parse_int=_check_integer)
    return value


def _check_limits(dialogue: Dialogue, limits: InputLimits) -> None:
    if len(dialogue.utterances) > limits.turns:
        raise RecordError("too_many_turns", f"the dialogue has over {limits.turns:,} turns")
    for turn, utterance in enumerate(dialogue.utterances, start=1):
        if len(utterance.text) > limits.characters:
            reason = f"turn {turn}: its text has over {limits.characters:,} characters"
            raise RecordError("text_too_long", reason)


def _depth_exceeds(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _read_line(stream: BinaryIO, limits: InputLimits, byte: int) -> tuple[bytes, int]:
    """The line that begins at `byte`, or the beginning of one that is too long, and its size.

    Raises:
        RecordError: nothing after here can be read.
        OSError: the disk, or the network, gives no more.
    """
    remaining = limits.file_bytes - byte if is_compressed(stream) else None
    try:
        line = stream.readline(limits.line_bytes + 1)
        size = len(line)
        if size > limits.line_bytes:
            size += 0 if line.endswith(b"\n") else _skip_line(stream, remaining)
            line = line[: 4 * _RAW]
    except DAMAGE_ERRORS as error:
        reason = f"the file is broken from here on ({error}): fetch or compress it again"
        if "requires too much memory" in str(error):  # Zstandard's words
            reason = "the file's window is over 128 MiB: compress it again without --long"
        raise RecordError("broken", reason) from error
    if remaining is not None and size > remaining:
        raise RecordError(
            "file_too_large",
            f"the file decompresses to over {limits.file_bytes:,} bytes: if it is no bomb, give a "
            "higher --max-file-bytes",
        )
    return line, size


def _skip_line(stream: BinaryIO, limit: int | None) -> int:
    """Read on to the end of the line, or until so many bytes; the bytes read."""
    skipped = 0
    while piece := stream.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n") or (limit is not None and skipped > limit):
            break
    return skipped


def _has_large_float(value: object) -> bool:
    """Whether a float in a JSON value may stand for an integer beyond 64 bits."""
    stack = [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, float) and abs(inner) >= 1 << 63:
            return True
        if isinstance(inner, dict | list):
            stack += inner.values() if isinstance(inner, dict) else inner
    return False


def _check_integer(digits: str) -> int:
    # orjson turns an integer beyond 64 bits into a float: the user's own field would change.
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 64:
        raise RecordError("number", f"an integer beyond 64 bits ({digits[:24]}…): quote it")
    return int(digits)
