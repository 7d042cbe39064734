"""`ercbatch label --dry-run`: what a run would come to."""

from __future__ import annotations

import time
from collections.abc import Callable

from ercbatch.dialogues import Dialogue
from ercbatch.errors import UsageError
from ercbatch.inputs.files import STDIN
from ercbatch.inputs.records import Reader
from ercbatch.labeler import Labeler
from ercbatch.runs.output import Files, print_reject
from ercbatch.runs.preflight import RunOptions, check_files, refuse_overwrite

_SAMPLE_UTTERANCES = 200
"""Utterances that are labelled to estimate the speed, at least."""


def dry_run_label(load: Callable[[], Labeler], options: RunOptions) -> str:
    """Read all of the input, verify the bundle, time some dialogues; what a run would come to.

    Raises:
        UsageError: the input is stdin, which can be read only once.
    """
    if STDIN in options.inputs:
        raise UsageError("--dry-run reads the input twice, and stdin can be read only once")
    if options.output is not None:
        files = Files.of(options.output, options.rejects)
        check_files(files, options)
        refuse_overwrite(files, options, stopped=files.journal.exists())
    labeler = load()
    accepted = rejected = utterances = sampled = 0
    sample: list[Dialogue] = []
    reader = Reader(options.inputs, options.limits)
    for record in reader:
        if record.reject is not None:
            rejected += 1
            print_reject(record.reject)
        elif record.dialogue is not None:
            accepted += 1
            utterances += len(record.dialogue.utterances)
            if sampled < _SAMPLE_UTTERANCES:
                sample.append(record.dialogue)
                sampled += len(record.dialogue.utterances)
    start = time.monotonic()
    timed = sum(len(labeled.labels) for labeled in labeler.label(sample))
    seconds = (time.monotonic() - start) * utterances / max(1, timed)
    return (
        f"{accepted:,} dialogues, {utterances:,} utterances; {rejected:,} lines to "
        f"reject, {reader.position.blank:,} blank. Bundle {labeler.bundle.info.name} is whole. "
        f"Labelling would take about {seconds:,.0f} s"
    )
