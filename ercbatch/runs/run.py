"""A labelling run: files in, a file (or stdout) out, every line accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from ercbatch.checked import mapping, number
from ercbatch.digests import file_sha256
from ercbatch.errors import (
    ErcbatchError,
    InputError,
    LimitError,
    OutputError,
    ResumableOutputError,
    UsageError,
)
from ercbatch.inputs.files import PLAIN_ENDINGS, decode_name
from ercbatch.inputs.records import Reader, Record
from ercbatch.labeler import Labeler
from ercbatch.runs.identity import InputSnapshot, check_same, find_differences, identity_of
from ercbatch.runs.journal import Counts, Journal, ResumePoint
from ercbatch.runs.output import FileOutput, Files, Output, StreamOutput, complete
from ercbatch.runs.preflight import (
    RunOptions,
    can_reread,
    check_files,
    check_rejects,
    refuse_overwrite,
)
from ercbatch.terminal.progress import Progress
from ercbatch.terminal.stopping import Stopper


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Counts of a run, and the seconds that labelling took."""

    counts: Counts
    seconds: float


def run_label(
    load: Callable[[], Labeler], options: RunOptions, stop: Stopper | None = None
) -> RunSummary:
    """Label every dialogue of the inputs, in order. `load` is called when all is checked.

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
            return _label(load(), options, stream, ResumePoint(), stop)
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
        refuse_overwrite(files, options, stopped=journal.has_run)
        try:
            return _label_to_files(load(), options, files, journal, stop)
        except OSError as error:
            what = f"{error.filename or files.part}: {error.strerror}"
            if not can_reread(options.inputs):
                raise OutputError(
                    f"{what}: stdin and pipes cannot be read again: see to it, and begin anew with "
                    "--force"
                ) from error
            raise ResumableOutputError(f"{what}: see to it, and go on") from error


def _label_to_files(
    labeler: Labeler, options: RunOptions, files: Files, journal: Journal, stop: Stopper
) -> RunSummary:
    inputs = InputSnapshot(options.inputs)
    identity = identity_of(labeler, options, files, inputs)
    stopped = journal.has_run
    if options.resume and (stopped or files.output.exists()):
        if not inputs.rereadable:
            raise UsageError(
                "--resume: stdin and pipes cannot be read again: begin anew with --force, or label "
                "a file"
            )
        if not stopped:
            return _check_complete(files, identity)
        assert journal.identity is not None
        check_same(journal.identity, identity, files)
        if journal.manifest is not None:  # it was done, but for its last steps
            return _finish(files, journal, journal.manifest)
    else:
        journal.begin(identity)
    try:
        output = FileOutput(files, journal, options.commit_seconds)
    except UsageError:
        if not stopped:  # nothing has begun
            journal.remove()
        raise
    start = ResumePoint() if journal.commit is None else journal.commit.point
    try:
        summary = _label(labeler, options, output, start, stop)
    finally:
        with stop.shield():
            output.close()
    try:
        inputs.check_unchanged()
    except InputError:
        journal.begin(identity)  # else a run over what they were would go on from here
        raise
    manifest = {
        **identity,
        "output": _output(files, output.sha256),
        "counts": asdict(summary.counts),
        "seconds": round(summary.seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with stop.shield():
        summary = _finish(files, journal, manifest)
        stop.forget()  # it came too late
        return summary


def _label(
    labeler: Labeler,
    options: RunOptions,
    output: Output,
    start: ResumePoint,
    stop: Stopper,
) -> RunSummary:
    """Label what follows after `start`."""
    reader = Reader(options.inputs, options.limits, start.chunk_start)
    counts = start.counts
    _check_errors(counts.rejected, options.max_errors)
    with _ByteProgress(options) as progress:
        records = ((record, record.dialogue) for record in reader)
        for entry, labeled in labeler.label_items(records, start.written):
            record = entry.origin
            utterances = len(labeled.labels) if labeled is not None else 0
            with stop.shield():
                counts = Counts(
                    lines=record.end.lines,
                    labelled=counts.labelled + (labeled is not None),
                    rejected=counts.rejected + (labeled is None),
                    blank=record.end.blank,
                    utterances=counts.utterances + utterances,
                )
                seconds = start.seconds + progress.seconds
                point = ResumePoint(entry.first_in_chunk.start, entry.index + 1, counts, seconds)
                if labeled is not None:
                    output.write(labeled, point)
                elif record.reject is not None:
                    output.reject(record.reject, point)
                    _check_errors(counts.rejected, options.max_errors)
            progress.update(utterances, counts.rejected, record)
    counts = replace(counts, lines=reader.position.lines, blank=reader.position.blank)
    if counts.lines != counts.labelled + counts.rejected + counts.blank:
        raise ErcbatchError(
            f"of {counts.lines} lines {counts.labelled} are labelled, {counts.rejected} rejected "
            f"and {counts.blank} blank: please report it"
        )
    return RunSummary(counts, start.seconds + progress.seconds)


class _ByteProgress(Progress):
    """Progress by the bytes of the inputs that lie behind."""

    def __init__(self, options: RunOptions) -> None:
        plain = can_reread(options.inputs) and all(
            name.endswith(PLAIN_ENDINGS) for name in options.inputs
        )
        sizes = [Path(name).stat().st_size for name in options.inputs] if plain else []
        self._offsets = [sum(sizes[:source]) for source in range(len(options.inputs))]
        super().__init__(sum(sizes) if plain else None, quiet=options.quiet)

    def update(self, utterances: int, rejected: int, record: Record) -> None:
        """Count some utterances, up to the end of a record."""
        self.count(utterances, rejected, self._offsets[record.end.source] + record.end.byte)


def _finish(files: Files, journal: Journal, manifest: dict[str, Any]) -> RunSummary:
    summary = _summary(manifest, files)
    complete(files, journal, manifest)
    return summary


def _check_complete(files: Files, identity: dict[str, Any]) -> RunSummary:
    """See that an output is that of this very run."""
    exists = f"{files.output} exists"
    try:
        manifest = mapping(orjson.loads(files.manifest.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{exists}, but no journal or manifest of a run: choose another --output, or give "
            "--force"
        ) from error
    differences = find_differences({key: manifest.get(key) for key in identity}, identity)
    output = _output(files, file_sha256(files.output))
    differences += find_differences({"output": manifest.get("output")}, {"output": output})
    if differences:
        raise UsageError(
            f"{exists}, and is of another run ({'; '.join(differences)}): choose another --output, "
            "or give --force"
        )
    return _summary(manifest, files)


def _summary(manifest: Mapping[str, Any], files: Files) -> RunSummary:
    try:
        return RunSummary(Counts.from_json(manifest["counts"]), number(manifest["seconds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{files.manifest}: it says not what a run came to: give --force"
        ) from error


def _check_errors(rejected: int, limit: int | None) -> None:
    if limit is not None and rejected > limit:
        raise LimitError(
            f"more than {limit} bad lines: mend the input, or raise --max-errors "
            "(the rejects say what is wrong with each)"
        )


def _output(files: Files, digest: str) -> dict[str, str]:
    return {"file": decode_name(files.output.name), "sha256": digest}
