"""Lines that are not dialogues, and the codes of their rejects."""

from __future__ import annotations

from ercbatch.inputs.records import DEFAULT_LIMITS

GOOD = b'{"utterances":[{"text":"Hello."}]}'


def with_field(value: bytes) -> bytes:
    return b'{"utterances":[{"text":"Hello."}],"n":' + value + b"}"


BAD = {
    "truncated": (GOOD[:-3], "json"),
    "not json": (b"Hello.", "json"),
    "not an object": (b"[1]", "not_object"),
    "null": (b"null", "not_object"),
    "no utterances": (b"{}", "no_utterances"),
    "wrong types": (b'{"utterances":[{"text":1}]}', "bad_text"),
    "only a NUL": (b"\0", "json"),
    "NUL in text": (b'{"utterances":[{"text":"a\0b"}]}', "json"),
    "invalid UTF-8": (b'{"utterances":[{"text":"a\x92b"}]}', "encoding"),
    "surrogate as UTF-8": (b'{"utterances":[{"text":"\xed\xa0\x80"}]}', "encoding"),
    "lone surrogate": (b'{"utterances":[{"text":"\\ud83d"}]}', "json"),
    "NaN": (with_field(b"NaN"), "json"),
    "Infinity": (with_field(b"-Infinity"), "json"),
    "beyond float": (with_field(b"1e400"), "number"),
    "65-bit integer": (with_field(b"18446744073709551616"), "number"),
    "below 64 bits": (with_field(b"-9223372036854775809"), "number"),
    "5,000 digits": (with_field(b"7" * 5000), "number"),
    "deep": (with_field(b"[" * 300 + b"]" * 300), "too_deep"),
    "deep, with a long number": (with_field(b"[" * 990 + b"1" * 19 + b"]" * 990), "too_deep"),
    "200,000 deep": (with_field(b"[" * 200_000 + b"]" * 200_000), "json"),
    "200,000 open": (b"[" * 200_000, "json"),
    "too many turns": (
        b'{"utterances":[' + b",".join([b'{"text":""}'] * (DEFAULT_LIMITS.turns + 1)) + b"]}",
        "too_many_turns",
    ),
    "second byte order mark": (b"\xef\xbb\xbf" + GOOD, "json"),
}
