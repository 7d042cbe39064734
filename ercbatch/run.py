"""A labelling run: files in, a file (or stdout) out, every line accounted for."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rich.console import Console

from ercbatch.dialogues import Dialogue, LabeledDialogue
from ercbatch.errors import InputError, UsageError
from ercbatch.labeler import Labeler
from ercbatch.progress import Progress
from ercbatch.records import (
    MANIFEST,
    REJECTS,
    STDIN,
    Accepted,
    Counts,
    Reject,
    dump_record,
    read_records,
)
from ercbatch.transcript import print_dialogue, printable

_TIMED = 200
"""Utterances that a dry run labels to estimate the speed, about."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a run reads and writes, and when it gives up."""

    inputs: tuple[str, ...]
    output: Path | None = None
    """None: stdout."""
    rejects: Path | None = None
    """None: beside the output; for stdout, on stderr."""
    max_errors: int | None = None
    force: bool = False
    quiet: bool = False


@dataclass(slots=True)
class RunSummary:
    """What a run came to."""

    counts: Counts = field(default_factory=Counts)
    utterances: int = 0
    seconds: float = 0.0


class _FileSink:
    """Writes OUT.part, which becomes OUT when the run is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        try:
            self._file = self._part.open("wb")
        except OSError as error:
            raise UsageError(
                f"{self._part}: cannot be written: {error.strerror}: choose another --output"
            ) from error
        self.sha256 = hashlib.sha256()

    def write(self, labeled: LabeledDialogue) -> None:
        line = dump_record(labeled.to_record())
        self._file.write(line)
        self.sha256.update(line)

    def close(self, complete: bool) -> None:
        if complete:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if complete:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)


class _LineSink:
    """Writes JSON lines to a stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, labeled: LabeledDialogue) -> None:
        self._stream.write(dump_record(labeled.to_record()))
        self._stream.flush()

    def close(self, complete: bool) -> None:
        self._stream.flush()


class _TranscriptSink:
    """Shows dialogues to a person."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=False)

    def write(self, labeled: LabeledDialogue) -> None:
        print_dialogue(self._console, labeled)

    def close(self, complete: bool) -> None:
        pass


class _Rejects:
    """Writes rejects to a file, made when the first one comes; without a file, to stderr."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        if path is not None:
            path.unlink(missing_ok=True)

    def write(self, reject: Reject) -> None:
        if self._path is None:
            place = printable(reject.at.file)
            print(f"{place}, line {reject.at.line}: {reject.reason}", file=sys.stderr)
            return
        if self._file is None:
            self._file = self._path.open("wb")
        self._file.write(dump_record(reject.to_record()))

    def __enter__(self) -> _Rejects:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def run_label(labeler: Callable[[], Labeler], options: RunOptions) -> RunSummary:
    """Label every dialogue of the inputs, in order. `labeler` is called once all is checked.

    Raises:
        UsageError: the output is in the way, or is an input.
        InputError: an input cannot be read on, or has more bad lines than `max_errors`.
    """
    output, rejects = options.output, options.rejects
    if output is not None:
        rejects = rejects or output.with_name(output.name + REJECTS)
        _check_output(output, options)
    loaded = labeler()
    summary = RunSummary()
    sink: _FileSink | _LineSink | _TranscriptSink
    if output is not None:
        sink = _FileSink(output)
    elif sys.stdout.isatty():
        sink = _TranscriptSink()
    else:
        sink = _LineSink(sys.stdout.buffer)
    complete = False
    try:
        with _Rejects(rejects) as refused, _progress(options) as progress:
            stream = _items(options.inputs, summary.counts)
            bytes_before: dict[str, int] = {}
            for item, labeled in loaded.label_items(stream):
                if isinstance(item, Reject):
                    refused.write(item)
                    _check_errors(summary.counts, options.max_errors)
                elif labeled is not None:
                    sink.write(labeled)
                    summary.utterances += len(labeled.labels)
                bytes_before[item.at.file] = item.at.byte
                count = len(labeled.labels) if labeled else 0
                progress.update(count, summary.counts.rejected, sum(bytes_before.values()))
            summary.seconds = progress.seconds
        complete = True
    finally:
        sink.close(complete)
    if isinstance(sink, _FileSink) and output is not None:
        write_manifest(output, sink.sha256.hexdigest(), loaded, options, summary)
    return summary


def _items(
    inputs: Sequence[str], counts: Counts
) -> Iterator[tuple[Accepted | Reject, Dialogue | None]]:
    for name in inputs:
        for item in read_records(name, counts):
            yield item, item.dialogue if isinstance(item, Accepted) else None


def _check_output(output: Path, options: RunOptions) -> None:
    if output.exists() and not options.force:
        raise UsageError(f"{output} exists: choose another --output, or give --force")
    for name in options.inputs:
        if name != STDIN and output.exists() and output.samefile(name):
            raise UsageError(f"{output} is also an input: choose another --output")


def _check_errors(counts: Counts, most: int | None) -> None:
    if most is not None and counts.rejected > most:
        raise InputError(
            f"more than {most} bad lines: mend the input, or raise --max-errors "
            "(the rejects say what is wrong with each)"
        )


def _progress(options: RunOptions) -> Progress:
    total = 0
    for name in options.inputs:
        if name == STDIN or not name.endswith(("jsonl", "ndjson")) or not Path(name).is_file():
            return Progress(None, quiet=options.quiet)
        total += Path(name).stat().st_size
    return Progress(total, quiet=options.quiet)


def write_manifest(
    output: Path, digest: str, labeler: Labeler, options: RunOptions, summary: RunSummary
) -> None:
    """Write OUT.manifest.json: what was labelled, with what, and what it came to."""
    info = labeler.bundle.info
    files = []
    for name in options.inputs:
        entry: dict[str, Any] = {"file": name}
        if name != STDIN:
            with open(name, "rb") as file:
                entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        files.append(entry)
    manifest = labeler.bundle.folder / "bundle.json"
    counts = summary.counts
    value = {
        **labeler.releases(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "inputs": files,
        "output": {"file": output.name, "sha256": digest},
        "bundle": {
            "name": info.name,
            "sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        },
        "options": labeler.options(),
        "counts": {
            "lines": counts.lines,
            "labelled": counts.accepted,
            "rejected": counts.rejected,
            "blank": counts.blank,
            "utterances": summary.utterances,
        },
        "seconds": round(summary.seconds, 3),
    }
    path = output.with_name(output.name + MANIFEST)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def dry_run_label(labeler: Callable[[], Labeler], options: RunOptions) -> str:
    """Read all of the input, verify the bundle, time some dialogues; what a run would come to.

    Raises:
        UsageError: the input is stdin, which can be read only once.
    """
    if STDIN in options.inputs:
        raise UsageError("--dry-run reads the input twice, and stdin can be read only once")
    if options.output is not None:
        _check_output(options.output, options)
    loaded = labeler()
    counts = Counts()
    utterances = 0
    sample: list[Dialogue] = []
    for item, dialogue in _items(options.inputs, counts):
        if dialogue is not None:
            utterances += len(dialogue.utterances)
            if sum(len(d.utterances) for d in sample) < _TIMED:
                sample.append(dialogue)
        elif options.rejects is None and isinstance(item, Reject):
            print(f"{printable(item.at.file)}, line {item.at.line}: {item.reason}", file=sys.stderr)
    began = time.monotonic()
    timed = sum(len(labeled.labels) for labeled in loaded.label(sample))
    seconds = (time.monotonic() - began) * utterances / max(1, timed)
    return (
        f"{counts.accepted:,} dialogues, {utterances:,} utterances; {counts.rejected:,} lines to "
        f"reject, {counts.blank:,} blank. Bundle {loaded.bundle.info.name} is whole. "
        f"Labelling would take about {seconds:,.0f} s"
    )
