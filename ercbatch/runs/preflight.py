"""What is asked of a run, and seen to before anything is read, loaded or written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ercbatch.errors import UsageError
from ercbatch.inputs.files import STDIN
from ercbatch.inputs.records import DEFAULT_LIMITS, InputLimits
from ercbatch.runs.output import Files


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a run reads and writes, and when it gives up."""

    inputs: tuple[str, ...]
    output: Path | None = None
    """None: stdout."""
    rejects: Path | None = None
    """None: beside the output; for stdout, on stderr."""
    max_errors: int | None = None
    limits: InputLimits = DEFAULT_LIMITS
    commit_seconds: float = 2.0
    """What is labelled is safe so much later."""
    resume: bool = False
    """Go on with a run that was stopped."""
    force: bool = False
    quiet: bool = False


def can_reread(inputs: Sequence[str]) -> bool:
    """Whether inputs can be read again, if they are there: stdin and pipes can't."""
    return all(
        name != STDIN and (Path(name).is_file() or not os.path.lexists(name)) for name in inputs
    )


def check_files(files: Files, options: RunOptions) -> None:
    """See that what will be written can be, and is nothing that is read.

    Raises:
        UsageError: it cannot be, or is.
    """
    _check_name(files.output, files.unfinished_manifest.name, "--output")
    side_files = files.part, files.journal, files.manifest, files.unfinished_manifest
    paths = (files.output, *side_files)
    for path in paths:
        if path.exists() and any(n != STDIN and path.samefile(n) for n in options.inputs):
            raise UsageError(f"{path} is also an input: choose another --output")
        if _is_irregular(path):
            raise UsageError(
                f"{path} is no file, or a link: choose another --output, or none for stdout"
            )
    check_rejects(files.rejects, options, may_exist=True)
    resolved = [path.parent.resolve() / path.name for path in paths]
    if files.rejects.parent.resolve() / files.rejects.name in resolved:
        raise UsageError(f"{files.rejects} is written otherwise: choose another --rejects")


def _check_name(path: Path, longest_name: str, option: str) -> None:
    if not path.name or not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder: choose another {option}")
    if len(os.fsencode(longest_name)) > os.pathconf(path.parent, "PC_NAME_MAX"):
        raise UsageError(f"{path.name}: the name is too long: choose a shorter {option}")


def _is_irregular(path: Path) -> bool:
    """Whether a folder, a pipe or a device is there; or a link, in whose place a file would be."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def check_rejects(path: Path, options: RunOptions, *, may_exist: bool = False) -> None:
    """Check that rejects can be written to `path`.

    It must not be an input. It must not exist, except with --force or where it `may_exist`.

    Raises:
        UsageError: they cannot be written there.
    """
    _check_name(path, path.name, "--rejects")
    if not os.path.lexists(path):
        return
    if _is_irregular(path):
        raise UsageError(f"{path} is no file, or a link: choose another --rejects")
    if any(name != STDIN and path.samefile(name) for name in options.inputs):
        raise UsageError(f"{path} is also an input: choose another --rejects")
    if not (may_exist or options.force):
        raise UsageError(f"{path} exists: choose another --rejects, or give --force")


def refuse_overwrite(files: Files, options: RunOptions, *, stopped: bool) -> None:
    """See that nothing is overwritten unasked.

    Raises:
        UsageError: something would be.
    """
    if options.force or (stopped and options.resume):
        return
    if stopped:
        advice = "--force begins anew"
        if can_reread(options.inputs):
            advice = f"--resume goes on with it, {advice}"
        raise UsageError(f"{files.part} is of a run that was stopped: {advice}")
    if files.output.exists():
        if options.resume:
            return  # it is looked at, and nothing is written
        raise UsageError(f"{files.output} exists: choose another --output, or give --force")
    for path in (files.part, files.manifest, files.unfinished_manifest, files.rejects):
        if path.exists():
            raise UsageError(f"{path} exists: move it, or give --force")
