"""How to resume a labelling run that ends early."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from ercbatch.errors import (
    RESUMABLE,
    InputError,
    LimitError,
    OutputError,
    UnreadableError,
    UsageError,
)
from ercbatch.runs.output import Files
from ercbatch.runs.preflight import can_reread
from ercbatch.terminal.stopping import Stopped


@contextmanager
def advise_resuming(output: Path | None, inputs: Sequence[str]) -> Iterator[None]:
    """Says how to go on with a labelling run that ends early, if one can."""
    try:
        yield
    except (UsageError, OutputError):
        raise
    except BaseException as error:
        begun = output is not None and Files.of(output, None).journal.exists()
        rereadable = begun and can_reread(inputs)
        # An input that is broken, or was changed, must become another one first.
        valid = not isinstance(error, InputError) or isinstance(error, LimitError | UnreadableError)
        begun = begun and valid
        if isinstance(error, Stopped):
            click.echo(f"ercbatch: {error}", err=True)
        if begun and rereadable:
            condition = ", with a higher --max-errors" if isinstance(error, LimitError) else ""
            click.echo(f"ercbatch: to go on{condition}: {_resume_command(sys.argv)}", err=True)
        elif begun:
            click.echo("ercbatch: stdin and pipes cannot be read again, to go on", err=True)
        if isinstance(error, Stopped):
            # Threads may be at work on packs, or wait for input: none of them is waited for, nor
            # is whoever reads stdout.
            sys.stderr.flush()
            os._exit(RESUMABLE if rereadable else 128 + error.number)
        raise


def _resume_command(argv: Sequence[str]) -> str:
    """The command that goes on with the one that was given."""
    module = Path(argv[0]).name == "__main__.py"
    program = ["python", "-m", "ercbatch"] if module else [Path(argv[0]).name]
    at = argv.index("label") + 1
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = [word for word in argv[at:end] if word not in ("--force", "--resume")]
    words = [*program, *argv[1:at], "--resume", *arguments, *argv[end:]]
    return " ".join(map(_quote, words))


def _quote(word: str) -> str:
    """A word as a shell takes it; one that is not UTF-8 as bash, zsh and ksh do."""
    if word.isprintable():
        return shlex.quote(word)
    letters = (
        chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in os.fsencode(word)
    )
    return f"$'{''.join(letters)}'"
