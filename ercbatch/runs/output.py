"""Where labelled dialogues and rejects go: a stream, or files with a journal beside them."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson
from rich.console import Console

from ercbatch.checked import mapping
from ercbatch.dialogues import LabeledDialogue
from ercbatch.digests import file_sha256
from ercbatch.errors import OutputError
from ercbatch.inputs.files import MANIFEST_ENDING, REJECTS_ENDING, decode_name
from ercbatch.inputs.records import Reject, dump_line
from ercbatch.runs.appended import AppendedFile, put_in_place
from ercbatch.runs.journal import Commit, Journal, ResumePoint
from ercbatch.terminal.streams import printable
from ercbatch.terminal.transcript import print_dialogue

_PART, _JOURNAL = ".part", ".journal"
"""Endings of the names of what stands beside an output while it is written."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a run whose output is a file."""

    output: Path
    rejects: Path

    @classmethod
    def of(cls, output: Path, rejects: Path | None) -> Files:
        """Those of an output; rejects have a place of their own, or are beside it."""
        return cls(output, rejects or output.with_name(output.name + REJECTS_ENDING))

    @property
    def part(self) -> Path:
        """The output while it is incomplete."""
        return self._beside(_PART)

    @property
    def journal(self) -> Path:
        """How far that is whole."""
        return self._beside(_JOURNAL)

    @property
    def manifest(self) -> Path:
        """What was labelled, with what, and what it came to."""
        return self._beside(MANIFEST_ENDING)

    @property
    def unfinished_manifest(self) -> Path:
        """The manifest until it is whole."""
        return self._beside(MANIFEST_ENDING + _PART)

    def earlier_outputs(self) -> tuple[Path, ...]:
        """What a run has left here: no input, though it be in an input folder."""
        with suppress(OSError, ValueError, TypeError):  # a name that is too long, say
            if self.journal.exists():
                return self.output, self.rejects
            manifest = orjson.loads(self.manifest.read_bytes()) if self.manifest.is_file() else {}
            if mapping(manifest).get("rejects") == decode_name(str(self.rejects)):
                return self.output, self.rejects
        return ()

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(self.output.name + ending)


def print_reject(reject: Reject) -> None:
    """Say on stderr what is wrong with a line."""
    print(f"{printable(reject.file)}, line {reject.line}: {reject.reason}", file=sys.stderr)


class Output(Protocol):
    """Where a run writes. `point` is how far the run has come with what is written."""

    def write(self, labeled: LabeledDialogue, point: ResumePoint) -> None:
        """Write a labelled dialogue."""

    def reject(self, reject: Reject, point: ResumePoint) -> None:
        """Write a reject."""

    def close(self) -> None:
        """Close the files, with all that was written in them."""


class StreamOutput:
    """Labelled dialogues on stdout, as they come; rejects in a file, or as sentences on stderr.

    Raises:
        OSError: the file cannot be written.
        UsageError: it cannot be opened, or another run writes to it.
    """

    def __init__(self, rejects: Path | None) -> None:
        self._rejects = None if rejects is None else AppendedFile(rejects)
        terminal = sys.stdout.isatty()
        self._console = Console(highlight=False, soft_wrap=False) if terminal else None

    def write(self, labeled: LabeledDialogue, point: ResumePoint) -> None:
        """See `Output.write`."""
        if self._console is not None:
            print_dialogue(self._console, labeled)
            return
        sys.stdout.buffer.write(dump_line(labeled.to_record()))
        sys.stdout.buffer.flush()

    def reject(self, reject: Reject, point: ResumePoint) -> None:
        """See `Output.reject`."""
        if self._rejects is None or reject.ends_file:
            print_reject(reject)
        if self._rejects is None:
            return
        self._rejects.add(dump_line(reject))
        self._rejects.flush()

    def close(self) -> None:
        """See `Output.close`."""
        if self._rejects is not None:
            self._rejects.close()
            _remove_empty(self._rejects.path)


class FileOutput:
    """Labelled dialogues in OUT.part and rejects beside it, committed to the journal as they come.

    A thread of its own commits, so that whatever was written is on the disk `interval` seconds
    later, however long the next dialogue takes.

    Raises:
        OSError: the files cannot be read or cut.
        OutputError: they hold something else than the journal says.
        UsageError: they cannot be opened, or another run writes there.
    """

    def __init__(self, files: Files, journal: Journal, interval: float) -> None:
        self._journal = journal
        commit = journal.commit
        # Rejects have their file from the start, so that no other run takes the name meanwhile.
        if commit is None:
            self._rejects = AppendedFile(files.rejects)
            try:
                self._output = AppendedFile(files.part)
            except BaseException:
                _remove_empty(files.rejects)
                raise
        else:
            self._rejects = AppendedFile(files.rejects, commit.rejects)
            self._output = AppendedFile(files.part, commit.output)
        self._interval = interval
        self._point: ResumePoint | None = None
        """What is written and not committed."""
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._commit_regularly, name="ercbatch-commit")
        self._thread.daemon = True
        self._thread.start()

    def write(self, labeled: LabeledDialogue, point: ResumePoint) -> None:
        """See `Output.write`.

        Raises:
            OSError, OutputError: it, or what was written before, cannot be brought to the disk.
        """
        self._add(self._output, dump_line(labeled.to_record()), point)

    def reject(self, reject: Reject, point: ResumePoint) -> None:
        """See `Output.reject`.

        Raises:
            OSError, OutputError: see `write`.
        """
        if reject.ends_file:
            print_reject(reject)
        self._add(self._rejects, dump_line(reject), point)

    def _add(self, file: AppendedFile, line: bytes, point: ResumePoint) -> None:
        if self._failure is not None:
            raise self._failure
        with self._lock:
            try:
                file.add(line)
            except OSError as error:  # how much of it is there? nothing more is committed
                self._failure = error
                raise
            self._point = point

    def _commit_regularly(self) -> None:
        try:
            while not self._stopping.wait(self._interval):
                self._commit()
        except BaseException as error:  # it is raised where more is written
            self._failure = error

    def _commit(self) -> None:
        """Bring to the disk what is written, and then say so in the journal."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            point, self._point = self._point, None
            if point is None:
                return
            for file in (self._rejects, self._output):
                file.flush()
            commit = Commit(point, self._output.written(), self._rejects.written())
        for file in (self._rejects, self._output):
            file.settle()
        self._journal.write(commit)

    def close(self) -> None:
        """Commit what is written, and close the files.

        Raises:
            OSError, OutputError: it cannot be committed; what was committed before still is.
        """
        self._stopping.set()
        self._thread.join()
        try:
            self._commit()
        finally:
            for file in (self._output, self._rejects):
                file.close()

    @property
    def sha256(self) -> str:
        """Digest of the output."""
        return self._output.written().sha256


def _remove_empty(path: Path) -> None:
    with suppress(OSError):
        if not path.stat().st_size:
            path.unlink()


def complete(files: Files, journal: Journal, manifest: Mapping[str, Any]) -> None:
    """Put a whole output into its place; may be done again where it was broken off.

    Raises:
        OSError: it cannot be put there.
        OutputError: it is gone, or altered.
    """
    unplaced = files.part.exists()
    just_written = unplaced and journal.manifest is None  # it was written just now
    if journal.manifest is None:
        journal.finish(manifest)
    output = files.part if unplaced else files.output
    expected = mapping(manifest.get("output")).get("sha256")
    if not just_written and (not output.exists() or file_sha256(output) != expected):
        raise OutputError(f"{output}: it is not what was written: begin anew with --force")
    if unplaced:
        put_in_place(files.part, files.output)
    unfinished = files.unfinished_manifest
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        put_in_place(unfinished, files.manifest)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    _remove_empty(files.rejects)
    journal.remove()
