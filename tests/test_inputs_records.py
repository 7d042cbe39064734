"""JSONL input: one bad line costs one line, and every line is accounted for."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import sys
import tempfile
import tracemalloc
from pathlib import Path

import orjson
import pytest
import zstandard
from helpers.bad_lines import BAD, GOOD, with_field
from hypothesis import given, settings
from hypothesis import strategies as st
from slow.kill_loop import damaged

from ercbatch.dialogues import Dialogue
from ercbatch.errors import InputError, UsageError
from ercbatch.inputs.files import expand_inputs
from ercbatch.inputs.records import (
    BEGINNING,
    DEFAULT_LIMITS,
    Position,
    Reader,
    Record,
    Reject,
    dump_line,
    read_dialogues,
)


def read(path: Path) -> tuple[list[Record], Position]:
    """All records of a file, and the position at its end."""
    reader = Reader([str(path)])
    records = list(reader)
    assert reader.position.lines == len(records) + reader.position.blank
    assert all((r.dialogue is None) == (r.reject is not None) for r in records)
    return records, reader.position


def dialogue_of(record: Record) -> Dialogue:
    assert record.dialogue is not None
    return record.dialogue


def reject_of(record: Record) -> Reject:
    assert record.reject is not None
    return record.reject


def write(folder: Path, data: bytes, name: str = "in.jsonl") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("line", "code"), BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_a_reject_and_the_next_one_is_read(
    tmp_path: Path, line: bytes, code: str
) -> None:
    path = write(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    (before, bad, after), _ = read(path)
    assert before.dialogue == after.dialogue
    record = orjson.loads(dump_line(reject_of(bad)))
    assert record["code"] == code
    assert record["reason"]
    assert (record["file"], record["line"], record["byte"]) == (str(path), 2, len(GOOD) + 1)
    assert record["raw"] == line.decode("utf-8", "replace")[:200]


LEGAL = {
    "duplicate keys: the last counts": (
        b'{"utterances":[{"text":"a"}],"utterances":[{"text":"b"}]}',
        "b",
    ),
    "line separator in text": (
        '{"utterances":[{"text":"a\u2028b\x85c"}]}'.encode(),
        "a\u2028b\x85c",
    ),
    "escaped NUL": (b'{"utterances":[{"text":"a\\u0000b"}]}', "a\0b"),
    "surrogate pair": (b'{"utterances":[{"text":"\\ud83d\\ude00"}]}', "\U0001f600"),
    "blank text": (b'{"utterances":[{"text":""}]}', ""),
    "no end of line": (GOOD, "Hello."),
    "CRLF": (GOOD + b"\r\n", "Hello."),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD + b"\n", "Hello."),
}


@pytest.mark.parametrize(("data", "text"), LEGAL.values(), ids=LEGAL.keys())
def test_odd_but_legal_lines_are_read(tmp_path: Path, data: bytes, text: str) -> None:
    (item,), _ = read(write(tmp_path, data))
    assert dialogue_of(item).utterances[0].text == text


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    (record,), end = read(write(tmp_path, b"\n" + GOOD + b"\n \t\r\n\n"))
    assert (record.start.line, record.end.line) == (1, 2)
    assert (end.lines, end.blank) == (4, 3)


def test_empty_file(tmp_path: Path) -> None:
    assert read(write(tmp_path, b"")) == ([], BEGINNING)


def test_other_fields_are_written_as_they_were_read(tmp_path: Path) -> None:
    line = (
        b'{"id":18446744073709551615,"low":-9223372036854775808,"f":1.5,'
        b'"s":"123456789012345678901234567890","utterances":[{"t":[1.5,null,{}],"text":"\xc3\xa9"}]}\n'
    )
    (item,), _ = read(write(tmp_path, line))
    assert dump_line(dialogue_of(item).record) == line


def test_whatever_nesting_is_accepted_can_be_written(tmp_path: Path) -> None:
    lines = [with_field(b"[" * depth + b"]" * depth) for depth in range(240, 260)]
    records, _ = read(write(tmp_path, b"\n".join(lines)))
    written = [dump_line(r.dialogue.record) for r in records if r.dialogue is not None]
    assert 0 < len(written) < len(records)
    assert written == [line + b"\n" for line in lines[: len(written)]]


def test_a_line_over_the_limit_is_skipped_without_being_held(tmp_path: Path) -> None:
    line = b'{"utterances":[{"text":"' + b"x" * (4 * DEFAULT_LIMITS.line_bytes) + b'"}]}\n'
    path = write(tmp_path, line + GOOD + b"\n")
    del line
    tracemalloc.start()
    (long, good), _ = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (reject_of(long).code, len(reject_of(long).raw)) == ("too_long", 200)
    assert good.dialogue is not None
    assert (good.start.line, good.start.byte) == (1, path.stat().st_size - len(GOOD) - 1)
    assert peak < 3 * DEFAULT_LIMITS.line_bytes + (16 << 20)  # what 512 bytes decompress to
    path.unlink()  # pytest keeps its folders for three runs


def test_a_first_line_of_a_byte_order_mark_alone_is_blank(tmp_path: Path) -> None:
    items, end = read(write(tmp_path, b"\xef\xbb\xbf\n" + GOOD))
    assert (len(items), end.blank) == (1, 1)


def test_a_damaged_file_breaks_at_the_same_line_from_wherever_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, damaged(lines(4000)))
    items, _ = read(path)
    assert reject_of(items[-1]).code == "broken"
    assert 1000 < len(items) < 2001
    for start in (1, 200, 700, len(items) - 1):
        assert list(Reader([str(path)], start=items[start].start)) == items[start:]


def test_zeros_after_a_gzip_member_are_nothing(tmp_path: Path) -> None:
    items, _ = read(write(tmp_path, gzip.compress(lines(5)) + bytes(50_000)))
    assert len(items) == 5


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_one_reject(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, (GOOD.decode() + "\n").encode(encoding) * 3)
    (record,), end = read(path)
    reject = reject_of(record)
    assert (reject.code, reject.line, reject.byte) == ("utf_16", 1, 0)
    assert "convert it" in reject.reason
    assert end.lines == 1


def lines(count: int) -> bytes:
    noise = random.Random(1)
    return b"".join(
        dump_line({"utterances": [{"text": noise.randbytes(30).hex()}]}) for _ in range(count)
    )


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_compressed_files_are_known_by_their_first_bytes(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    data = lines(3000)
    # Two members one after another, as `cat a.gz b.gz` makes them, under a name that says nothing.
    path = write(tmp_path, pack(data) + pack(data), "in.jsonl")
    items, _ = read(path)
    assert sum(item.dialogue is not None for item in items) == 6000
    assert items[-1].start.byte == 2 * len(data) - (len(data) // 3000)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_the_lines_before_the_cut_of_a_compressed_file_are_read(
    tmp_path: Path, pack: object, share: float
) -> None:
    # zstandard's own stream reader takes the cut for the end: the run would seem to succeed.
    assert callable(pack)
    data: bytes = pack(lines(3000))
    path = write(tmp_path, data[: max(5, int(share * len(data)))])
    records, end = read(path)
    *good, last = records
    broken = reject_of(last)
    assert all(record.dialogue is not None for record in good)
    assert broken.code == "broken"
    assert "fetch or compress it again" in broken.reason
    assert broken.line == end.lines == len(good) + 1
    assert broken.byte == last.end.byte == (good[-1].end.byte if good else 0)
    assert len(good) >= 2900 * (share - 0.2)  # what is lost is at most the last block


def test_a_zstandard_bomb_stays_small(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    with (tmp_path / "in.jsonl").open("wb") as file:
        for _ in range(200):
            file.write(compressor.compress(bytes(1 << 20)))
        file.write(compressor.flush())
    tracemalloc.start()
    (item,), _ = read(tmp_path / "in.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reject_of(item).code == "too_long"
    assert peak < 3 * DEFAULT_LIMITS.line_bytes + (16 << 20)  # what 512 bytes decompress to


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    data = gzip.compress(GOOD + b"\n[]\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    good, bad = Reader(["-"])
    assert good.dialogue is not None
    assert (reject_of(bad).file, reject_of(bad).line) == ("<stdin>", 2)


def test_a_file_name_need_not_be_utf_8(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    try:
        Path(path).write_bytes(b"[]\n")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (record,) = Reader([path])
    assert b"caf\xef\xbf\xbd.jsonl" in dump_line(reject_of(record))


def test_expands_folders_globs_and_stdin(tmp_path: Path) -> None:
    for name in ("b.jsonl.gz", "a.jsonl", "c.ndjson", "notes.txt", "d.jsonl.zst"):
        write(tmp_path, b"", name)
    (tmp_path / "e.jsonl").mkdir()
    folder = str(tmp_path)
    names = ["a.jsonl", "b.jsonl.gz", "c.ndjson", "d.jsonl.zst"]
    assert expand_inputs([folder]) == [f"{folder}/{name}" for name in names]
    # What a run left there is not input again, unless it is named.
    for name in ("out.jsonl", "out.jsonl.manifest.json", "out.jsonl.rejects.jsonl"):
        write(tmp_path, b"", name)
    assert expand_inputs([folder]) == [f"{folder}/{name}" for name in names]
    assert expand_inputs([f"{folder}/out.jsonl"]) == [f"{folder}/out.jsonl"]
    for name in ("out.jsonl", "out.jsonl.manifest.json", "out.jsonl.rejects.jsonl"):
        (tmp_path / name).unlink()
    assert expand_inputs(["-", f"{folder}/*.jsonl*"]) == [
        "-",
        *(f"{folder}/{name}" for name in ("a.jsonl", "b.jsonl.gz", "d.jsonl.zst")),
    ]
    # Named outright, a file is read whatever it is called: even like a pattern.
    odd = write(tmp_path, b"", "[x].txt")
    assert expand_inputs([str(odd)]) == [str(odd)]


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/none.jsonl", f"{tmp_path}/*.jsonl", "x" * 5000, ""):
        with pytest.raises(InputError):
            expand_inputs([name])
    with pytest.raises(InputError, match="no JSONL file to label in this folder"):
        expand_inputs([str(tmp_path)])
    with pytest.raises(UsageError, match="twice"):
        expand_inputs(["-", "-"])
    with pytest.raises(InputError, match="cannot be read"):
        list(Reader([f"{tmp_path}/none.jsonl"]))


def test_read_dialogues_takes_no_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path, b"\n" + GOOD + b"\n{}\n")
    result = read_dialogues(path)
    assert next(result)[0] == 2
    with pytest.raises(InputError, match=r"in\.jsonl, line 3: .*: mend or remove the line"):
        next(result)


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([GOOD, b"", b" "])), max_size=8))
def test_any_bytes_are_accounted_for(parts: list[bytes]) -> None:
    # A plain line first, as a file can begin like UTF-16 or compressed data.
    data = b"#\n" + b"\n".join(parts)
    with tempfile.TemporaryDirectory() as folder:
        records, end = read(write(Path(folder), data))
    assert end.lines == data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
    for record in records:
        start = record.start
        assert data[: start.byte].count(b"\n") == start.line
        if record.dialogue is not None:
            assert json.loads(data[start.byte :].split(b"\n")[0]) == record.dialogue.record
