"""JSONL in: the lines of an input to dialogues; a bad line costs one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import orjson

from ercbatch.dialogues import Dialogue, parse_dialogue
from ercbatch.errors import InputError, RecordError, UnreadableError
from ercbatch.inputs.files import DAMAGES, STDIN, is_compressed, open_input, pass_over, shown

_BOM = b"\xef\xbb\xbf"
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
            pass_over(stream, byte)
        except (*DAMAGES, OSError) as error:
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


def _read_line(stream: BinaryIO, limits: Limits, byte: int) -> tuple[bytes, int]:
    """The line that begins at `byte`, or the beginning of one that is too long, and its size.

    Raises:
        RecordError: nothing after here can be read.
        OSError: the disk, or the network, gives no more.
    """
    most = limits.file_bytes - byte if is_compressed(stream) else None
    try:
        line = stream.readline(limits.line_bytes + 1)
        size = len(line)
        if size > limits.line_bytes:
            size += 0 if line.endswith(b"\n") else _skip_line(stream, most)
            line = line[: 4 * _RAW]
    except DAMAGES as error:
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
