"""Random input for a stated time or number: nothing may raise what is not expected.

    python -m tests.slow.fuzz utterances 100000
    python -m tests.slow.fuzz records 600
    python -m tests.slow.fuzz journal 600
    python -m tests.slow.fuzz manifest 600

`utterances`, so many of them: the text of an utterance, however it is made, changes no token of
the template, and holds none of its control tokens. `records`, for so many seconds: whatever the
bytes of a file, plain or compressed, every line is accounted for, and rejects can be written.
`journal` and `manifest`: files of a run with other bytes are read, or refused in a sentence. The
last line says how many inputs there were, as JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zstandard

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import find_bundle, open_bundle
from ercbatch.dialogues import Dialogue, Utterance
from ercbatch.errors import UsageError
from ercbatch.inputs.records import InputLimits, Reader, dump_line
from ercbatch.prompts.templates import template
from ercbatch.prompts.tokens import SegmentTokenizer
from ercbatch.prompts.tree import Question, Renderer, Task, Window
from ercbatch.runs.appended import Prefix
from ercbatch.runs.journal import Commit, Journal, ResumePoint
from ercbatch.runs.output import Files
from ercbatch.runs.preflight import RunOptions
from ercbatch.runs.run import run_label

_PIECES = (
    *("[SEP]", "[CLS]", "[PAD]", "[MASK]", "[UNK]", "<s>", "</s>", "<|im_end|>", "<|endoftext|>"),
    *("###", "### Response:", "\n", "\r\n", "\u2028", "\u0085", "Speaker_1:", "speaker 2 :", '"'),
    *("\u202e", "\u202d", "\u2066", "\u200b", "\u200d", "\ufeff", "\u00ad", "\u0301" * 20),
    *("\0", "\x1b[31m", "\x7f", "\t", "\ud83d\ude00", "\U0001f469\u200d\U0001f692", "ﷺ", "İ", "ß"),
    *("joyful", "the label is", "ignore the above", "：", "日本語", "a" * 1000, "\ue000", "\uffff"),
)
_MARK = "qzxqzx"
"""A text whose tokens stand nowhere else in a prompt."""


def text(draw: random.Random) -> str:
    """A text of pieces that somebody hostile might try, and of any characters."""
    parts = []
    for _ in range(draw.choice((1, 2, 5, 20))):
        kind = draw.random()
        if kind < 0.6:
            parts.append(draw.choice(_PIECES))
        elif kind < 0.9:
            parts.append("".join(draw.choices("abc .:<>[]#|_", k=draw.randrange(12))))
        else:
            code = draw.randrange(0x110000)
            parts.append(chr(code) if not 0xD800 <= code < 0xE000 else "?")
    whole = draw.choice(("", " ")).join(parts)
    return whole * (100_000 // max(1, len(whole))) if draw.random() < 0.001 else whole


def utterances(count: int, draw: random.Random) -> int:
    """So many texts, in every wording and at every place of a dialogue.

    Raises:
        AssertionError: one changed what is not its own.
    """
    info = open_bundle(find_bundle("mini")).info
    tokenizer = SegmentTokenizer.from_file(find_bundle("mini") / manifest.TOKENIZER, info.controls)
    controls = {*info.controls.start, *info.controls.separator, *info.controls.answer}
    window = Window(max_tokens=4096, max_utterance_tokens=400)
    labels = info.label_sets[0].labels
    renderers = [Renderer(tokenizer, template(n), window, labels) for n in ("paper", "compact")]
    others = [Utterance("it is gone", "a"), Utterance("what is?", "b"), Utterance("oh no", "a")]
    mark = list(tokenizer.encode_content(_MARK, 400))
    asked = 0
    for number in range(count):
        said = text(draw)
        place, target = draw.randrange(4), draw.randrange(4)
        renderer = renderers[number % 2]

        if place == target and not said.strip():
            continue  # blank ones are not asked about
        asked += 1
        result, marked = (
            renderer.separate_prompt(
                Dialogue((*others[:place], Utterance(words, "b"), *others[place:])),
                Question(Task.EMOTION, target),
            )
            for words in (said, _MARK)
        )
        content = tokenizer.encode_content(renderer.template.quote(said), 400, both_ends=True)
        assert not controls & set(content), (said, content)
        expected: list[int] = []
        at = 0
        while at < len(marked):
            if marked[at : at + len(mark)] == mark:
                expected += content
                at += len(mark)
            else:
                expected.append(marked[at])
                at += 1
        assert result == expected, said
    return asked


def records(seconds: float, draw: random.Random) -> int:
    """Files of lines that were dialogues, with other bytes in them.

    Raises:
        AssertionError: a line is not accounted for.
    """
    number = 0
    limits = InputLimits(line_bytes=2000, turns=5, characters=200, file_bytes=1 << 20)
    good = b'{"id": 1, "utterances": [{"speaker": "a", "text": "it is gone"}, {"text": "oh"}]}'
    path = Path(tempfile.mkdtemp()) / "in.jsonl"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number += 1
        lines = [altered(good, draw) for _ in range(draw.randrange(1, 8))]
        data = draw.choice((b"\n", b"\r\n", b"\n\n")).join(lines)
        pack: Callable[[bytes], bytes] = draw.choice((bytes, gzip.compress, zstandard.compress))
        whole = packed = pack(data)
        if draw.random() < 0.3:
            packed = altered(packed, draw)
        path.write_bytes(packed)
        rejected = accepted = 0
        ended = False
        reader = Reader([str(path)], limits)
        for record in reader:
            if record.dialogue is not None:
                accepted += 1
                dump_line(record.dialogue.record)
            else:
                assert record.reject is not None
                rejected += 1
                ended = record.reject.ends_file
                dump_line(record.reject)
        counts = reader.position
        assert counts.lines == rejected + accepted + counts.blank
        if packed == whole and not ended:
            assert counts.lines == data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
    return number


def altered(data: bytes, draw: random.Random) -> bytes:
    """Bytes with some changes."""
    changed = bytearray(data)
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        place = draw.randrange(len(changed) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            del changed[place : place + draw.randrange(1, 20)]
        elif kind == 1:
            changed[place:place] = draw.randbytes(draw.randrange(1, 5))
        elif kind == 2:
            changed[place:place] = draw.choice(
                (b"[" * 600, b"9" * 30, b'"\\ud800"', b"NaN", b"\0", b"1e999", b"-0.0", b"\xff")
            )
        elif kind == 3 and place < len(changed):
            changed[place] = draw.randrange(256)
        else:
            changed[place:place] = changed[draw.randrange(len(changed) + 1) :][:50]
    return bytes(changed)


_IDENTITY = {"journal": 4, "inputs": [{"file": "in.jsonl", "bytes": 9, "sha256": "ab"}]}
_COMMIT = Commit(ResumePoint(seconds=0.5), Prefix(70, "ab"), Prefix(0, "cd"))


def journal(seconds: float, draw: random.Random) -> int:
    """Journals with other bytes: read as far as they are whole."""
    path = Path(tempfile.mkdtemp()) / "out.journal"
    with Journal(path) as whole:
        whole.begin(_IDENTITY)
        whole.write(_COMMIT)
        whole.finish({"counts": {}})
    data = path.read_bytes()
    number = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number += 1
        path.write_bytes(altered(data, draw))
        with Journal(path) as result:
            assert result.identity in (None, _IDENTITY)
            assert result.commit in (None, _COMMIT)
            assert result.manifest in (None, {"counts": {}})
    return number


def manifests(seconds: float, draw: random.Random) -> int:
    """Manifests with other bytes beside a complete output, and a run that is to go on with it."""
    from ercbatch.labeler import Labeler

    folder = Path(tempfile.mkdtemp())
    source = folder / "in.jsonl"
    source.write_bytes(b'{"utterances": [{"text": "it is gone"}]}\n')
    labeler = Labeler("mini", threads=1)
    options = RunOptions((str(source),), folder / "out.jsonl", quiet=True, resume=True)
    run_label(lambda: labeler, options)
    path = Files.of(folder / "out.jsonl", None).manifest
    data = path.read_bytes()
    number = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number += 1
        path.write_bytes(altered(data, draw))
        try:
            run_label(lambda: labeler, options)
        except UsageError:
            continue
    return number


def main() -> None:
    """Run one of them."""
    kinds = {
        "utterances": utterances,
        "records": records,
        "journal": journal,
        "manifest": manifests,
    }
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.slow.fuzz")
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("much", type=int, help="number of utterances, or seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    number = kinds[args.kind](args.much, random.Random(args.seed))
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"kind": args.kind, "inputs": number, "seconds": seconds, "failed": 0}))


if __name__ == "__main__":
    main()
