"""A labelling run: files in, a file (or stdout) out, every line accounted for."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from ercbatch.bundle.manifest import MANIFEST as BUNDLE_MANIFEST
from ercbatch.checked import integer, mapping, number
from ercbatch.dialogues import Dialogue
from ercbatch.errors import (
    ErcbatchError,
    InputError,
    LimitError,
    OutputError,
    StoppedError,
    UsageError,
)
from ercbatch.inputs.files import STDIN, shown
from ercbatch.inputs.records import Accepted, Counts, Reject, read_records
from ercbatch.labeler import Labeler
from ercbatch.runs.journal import BEGINNING, FORMAT, Journal, Place, differences
from ercbatch.runs.output import FileOutput, Files, StreamOutput, Tally, complete, digest_of, tell
from ercbatch.runs.preflight import (
    RunOptions,
    can_resume,
    check_files,
    check_rejects,
    check_unasked,
)
from ercbatch.terminal.progress import Progress
from ercbatch.terminal.stopping import Stopper

_TIMED = 200
"""Utterances that a dry run labels to estimate the speed, about."""
_COUNTS = ("lines", "labelled", "rejected", "blank", "utterances")


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run came to: lines of input, and utterances."""

    lines: int
    labelled: int
    rejected: int
    blank: int
    utterances: int
    seconds: float

    def counts(self) -> dict[str, int]:
        """The counts, as a manifest has them."""
        return {name: getattr(self, name) for name in _COUNTS}


@dataclass(frozen=True, slots=True)
class _Origin:
    """An item, the index of its input, and the lines (those of them blank) up to it."""

    item: Accepted | Reject
    source: int
    lines: int
    blank: int

    def before(self) -> Place:
        """Where it begins."""
        at = self.item.at
        return Place(self.source, at.line - 1, at.byte, self.lines - 1, self.blank)


def run_label(
    labeler: Callable[[], Labeler], options: RunOptions, stop: Stopper | None = None
) -> RunSummary:
    """Label every dialogue of the inputs, in order. `labeler` is called once all is checked.

    Raises:
        UsageError: the output is in the way, or is an input; a run cannot be gone on with.
        InputError: an input cannot be read on (UnreadableError), was changed meanwhile, or has too
            many bad lines (LimitError).
        OutputError: the output is no longer what the run wrote, or cannot be written on and the
            input not read again.
        StoppedError: the output cannot be written on.
    """
    stop = stop or Stopper()  # which nothing calls
    if options.resume and (options.force or options.output is None):
        raise UsageError(
            "--resume goes on with an output file, and --force begins it anew: give --output and "
            "one of the two"
        )
    if options.output is None:
        if options.rejects is not None:
            check_rejects(options.rejects, options)
        stream = StreamOutput(options.rejects)
        try:
            return _label(labeler(), options, stream, Tally(), stop)
        finally:
            stream.close()
    files = Files.of(options.output, options.rejects)
    check_files(files, options)
    with Journal(files.journal) as journal:
        if journal.foreign and not options.force:
            raise UsageError(
                f"{files.journal} is no journal, or its beginning was altered: move it (and "
                f"{files.part}), or begin anew with --force"
            )
        check_unasked(files, options, stopped=journal.identity is not None)
        try:
            return _label_to_files(labeler(), options, files, journal, stop)
        except OSError as error:
            what = f"{error.filename or files.part}: {error.strerror}"
            if not can_resume(options.inputs):
                raise OutputError(
                    f"{what}: stdin and pipes cannot be read again: see to it, and begin anew with "
                    "--force"
                ) from error
            raise StoppedError(f"{what}: see to it, and go on") from error


def _label_to_files(
    labeler: Labeler, options: RunOptions, files: Files, journal: Journal, stop: Stopper
) -> RunSummary:
    inputs = _Inputs(options.inputs)
    identity = _identity(labeler, options, files, inputs)
    stopped = journal.identity is not None
    if options.resume and (stopped or files.output.exists()):
        if not all("sha256" in entry for entry in inputs.told):
            raise UsageError(
                "--resume: stdin and pipes cannot be read again: begin anew with --force, or label "
                "a file"
            )
        if not stopped:
            return _was_complete(files, identity)
        assert journal.identity is not None
        _check_same(journal.identity, identity, files)
        if journal.manifest is not None:  # it was done, but for its last steps
            return _completed(files, journal, journal.manifest)
    else:
        journal.begin(identity)
    try:
        output = FileOutput(files, journal, options.commit_seconds)
    except UsageError:
        if not stopped:  # nothing has begun
            journal.remove()
        raise
    start = Tally() if journal.commit is None else Tally.at(journal.commit)
    try:
        summary = _label(labeler, options, output, start, stop)
    finally:
        with stop.shield():
            output.stop()
    try:
        inputs.check()
    except InputError:
        journal.begin(identity)  # else a run over what they were would go on from here
        raise
    manifest = {
        **identity,
        "output": _output(files, output.sha256),
        "counts": summary.counts(),
        "seconds": round(summary.seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with stop.shield():
        summary = _completed(files, journal, manifest)
        stop.forget()  # it came too late
        return summary


def _label(
    labeler: Labeler,
    options: RunOptions,
    output: StreamOutput | FileOutput,
    start: Tally,
    stop: Stopper,
) -> RunSummary:
    """Label what follows after `start`."""
    counts = Counts(lines=start.restart.lines, blank=start.restart.blank)
    tally = start
    _check_errors(tally.rejected, options.max_errors)
    with _Measure(options) as measure:
        stream = _items(options, counts, start.restart)
        for origin, labeled, restart in labeler.label_items(stream, start.replayed, start.trees):
            bad = origin.item if isinstance(origin.item, Reject) else None
            count = len(labeled.labels) if labeled else 0
            with stop.shield():
                tally = Tally(
                    restart=restart.origin.before(),
                    replayed=restart.items,
                    trees=restart.trees,
                    labelled=tally.labelled + (bad is None),
                    rejected=tally.rejected + (bad is not None),
                    utterances=tally.utterances + count,
                    seconds=start.seconds + measure.seconds,
                )
                if labeled is not None:
                    output.write(labeled, tally)
                elif bad is not None:
                    output.reject(bad, tally)
                    _check_errors(tally.rejected, options.max_errors)
            measure.update(count, tally.rejected, origin)
    if counts.lines != tally.labelled + tally.rejected + counts.blank:
        raise ErcbatchError(
            f"of {counts.lines} lines {tally.labelled} are labelled, {tally.rejected} rejected and "
            f"{counts.blank} blank: please report it"
        )
    return RunSummary(
        counts.lines,
        tally.labelled,
        tally.rejected,
        counts.blank,
        tally.utterances,
        start.seconds + measure.seconds,
    )


def _items(
    options: RunOptions, counts: Counts, start: Place
) -> Iterator[tuple[_Origin, Dialogue | None]]:
    for source, name in enumerate(options.inputs):
        if source < start.source:
            continue
        at = (start.line, start.byte) if source == start.source else (0, 0)
        for item in read_records(name, counts, options.limits, at):
            dialogue = item.dialogue if isinstance(item, Accepted) else None
            yield _Origin(item, source, counts.lines, counts.blank), dialogue


class _Measure(Progress):
    """Progress by the bytes of the inputs that lie behind."""

    def __init__(self, options: RunOptions) -> None:
        plain = can_resume(options.inputs) and all(
            name.endswith(("jsonl", "ndjson")) for name in options.inputs
        )
        sizes = [Path(name).stat().st_size for name in options.inputs] if plain else []
        self._before = [sum(sizes[:source]) for source in range(len(options.inputs))]
        super().__init__(sum(sizes) if plain else None, quiet=options.quiet)

    def update(self, utterances: int, rejected: int, origin: _Origin) -> None:
        """Count some utterances, up to the end of an item."""
        self.count(utterances, rejected, self._before[origin.source] + origin.item.at.end)


class _Inputs:
    """What the inputs are; those that can be read again are read for their digests."""

    def __init__(self, names: Sequence[str]) -> None:
        self.told: list[dict[str, str | int]] = []
        self._seen: list[tuple[str, os.stat_result]] = []
        for name in names:
            entry: dict[str, str | int] = {"file": shown(name)}
            if can_resume([name]):
                try:
                    with open(name, "rb") as file:
                        seen = os.fstat(file.fileno())
                        entry["bytes"] = seen.st_size
                        entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise InputError(
                        f"{shown(name)}: cannot be read ({error.strerror}): check its rights"
                    ) from error
                self._seen.append((name, seen))
            self.told.append(entry)

    def check(self) -> None:
        """See that they are still the same.

        Raises:
            InputError: one is not.
        """
        for name, seen in self._seen:
            try:
                now = os.stat(name)
            except OSError:
                continue  # it was there while it was read
            if (now.st_size, now.st_mtime_ns) != (seen.st_size, seen.st_mtime_ns):
                raise InputError(
                    f"{shown(name)}: it was changed while it was labelled: label it anew with "
                    "--force"
                )


def _identity(
    labeler: Labeler, options: RunOptions, files: Files, inputs: _Inputs
) -> dict[str, Any]:
    """What the bytes of an output depend on: a run that goes on has the same."""
    bundle = labeler.bundle
    return {
        "journal": FORMAT,
        **labeler.releases(),
        "inputs": inputs.told,
        "bundle": {
            "name": bundle.info.name,
            "sha256": hashlib.sha256((bundle.folder / BUNDLE_MANIFEST).read_bytes()).hexdigest(),
        },
        "options": {**labeler.options(), **asdict(options.limits)},
        "rejects": shown(str(files.rejects)),
    }


def _check_same(was: dict[str, Any], now: dict[str, Any], files: Files) -> None:
    found = differences(was, now)
    if found:
        raise UsageError(
            f"{files.part} is of another run ({'; '.join(found)}): run it as it was, or begin anew "
            "with --force"
        )


def _completed(files: Files, journal: Journal, manifest: dict[str, Any]) -> RunSummary:
    summary = _summary(manifest, files)
    complete(files, journal, manifest)
    return summary


def _was_complete(files: Files, identity: dict[str, Any]) -> RunSummary:
    """See that an output is that of this very run."""
    exists = f"{files.output} exists"
    try:
        manifest = mapping(orjson.loads(files.manifest.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{exists}, but no journal or manifest of a run: choose another --output, or give "
            "--force"
        ) from error
    found = differences({key: manifest.get(key) for key in identity}, identity)
    output = _output(files, str(digest_of(files.output)))
    found += differences({"output": manifest.get("output")}, {"output": output})
    if found:
        raise UsageError(
            f"{exists}, and is of another run ({'; '.join(found)}): choose another --output, or "
            "give --force"
        )
    return _summary(manifest, files)


def _summary(manifest: Mapping[str, Any], files: Files) -> RunSummary:
    try:
        counts = mapping(manifest["counts"])
        numbers = {name: integer(counts[name], high=2**63 - 1) for name in _COUNTS}
        return RunSummary(**numbers, seconds=number(manifest["seconds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{files.manifest}: it says not what a run came to: give --force"
        ) from error


def _check_errors(rejected: int, most: int | None) -> None:
    if most is not None and rejected > most:
        raise LimitError(
            f"more than {most} bad lines: mend the input, or raise --max-errors "
            "(the rejects say what is wrong with each)"
        )


def _output(files: Files, digest: str) -> dict[str, str]:
    return {"file": shown(files.output.name), "sha256": digest}


def dry_run_label(labeler: Callable[[], Labeler], options: RunOptions) -> str:
    """Read all of the input, verify the bundle, time some dialogues; what a run would come to.

    Raises:
        UsageError: the input is stdin, which can be read only once.
    """
    if STDIN in options.inputs:
        raise UsageError("--dry-run reads the input twice, and stdin can be read only once")
    if options.output is not None:
        files = Files.of(options.output, options.rejects)
        check_files(files, options)
        check_unasked(files, options, stopped=files.journal.exists())
    loaded = labeler()
    counts = Counts()
    utterances = 0
    sample: list[Dialogue] = []
    sampled = 0
    for origin, dialogue in _items(options, counts, BEGINNING):
        if dialogue is not None:
            utterances += len(dialogue.utterances)
            if sampled < _TIMED:
                sample.append(dialogue)
                sampled += len(dialogue.utterances)
        elif isinstance(origin.item, Reject):
            tell(origin.item)
    began = time.monotonic()
    timed = sum(len(labeled.labels) for labeled in loaded.label(sample))
    seconds = (time.monotonic() - began) * utterances / max(1, timed)
    return (
        f"{counts.accepted:,} dialogues, {utterances:,} utterances; {counts.rejected:,} lines to "
        f"reject, {counts.blank:,} blank. Bundle {loaded.bundle.info.name} is whole. "
        f"Labelling would take about {seconds:,.0f} s"
    )
