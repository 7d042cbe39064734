"""The errors of ercbatch.

ErcbatchError                 exit 1
├── UsageError                exit 2: the call or its settings are wrong
│   └── MissingExtraError     an optional dependency is not installed
├── InputError                exit 4: an input file cannot be used at all
│   ├── LimitError            too many of its lines are bad: a run can go on with a higher limit
│   └── UnreadableError       the disk gives no more of it: a run can go on when it does
├── OutputError               exit 1: an output cannot be written
├── ResumableOutputError      exit 75: an output cannot be written on; the run can be gone on with
├── LossError                 exit 1: a bundle would fall short of the model it is made from
├── RecordError               one input line is bad: it becomes a reject, the run goes on
└── BundleError               exit 4: a bundle is missing, altered, or not for this program
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

FINISHED_WITH_REJECTS = 3
RESUMABLE = 75
"""Exit code of a run that ended early and can be resumed; BSD's EX_TEMPFAIL."""
CLOSED_PIPE = 141
"""Exit code when the reader of stdout has gone: 128 + SIGPIPE."""


class ErcbatchError(Exception):
    """Any error that ercbatch raises on purpose; its message ends with the next step."""

    exit_code: int = 1


class UsageError(ErcbatchError):
    """A setting, option or argument is wrong."""

    exit_code = 2


class MissingExtraError(UsageError):
    """An optional dependency is missing; the message says what to install."""


class InputError(ErcbatchError):
    """An input file cannot be read or is not what it should be."""

    exit_code = 4


class LimitError(InputError):
    """More lines are bad than was allowed; with a higher limit the run can go on."""


class UnreadableError(InputError):
    """The system cannot read on; the run can go on when it can."""


class OutputError(ErcbatchError):
    """An output cannot be written: the disk is full, say."""


class ResumableOutputError(ErcbatchError):
    """A run cannot write on; what it has committed is safe."""

    exit_code = RESUMABLE


class LossError(ErcbatchError):
    """A bundle would fall short of the model that it is made from."""


class RecordError(ErcbatchError):
    """One line is not a dialogue.

    `code` is a short stable word for programs, `reason` a sentence for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class BundleError(ErcbatchError):
    """A bundle cannot be loaded."""

    exit_code = 4


@contextmanager
def foreign_errors(kind: type[ErcbatchError], what: str, advice: str) -> Iterator[None]:
    """What libraries say of files that are not what they should be, as an error of ours.

    Each of them has errors of its own, or plain ones.

    Raises:
        ErcbatchError: ours as they are, and in place of every other exception one of this kind:
            what is wrong, the library's words, and what mends it.
    """
    try:
        yield
    except ErcbatchError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception, so that nobody should go on after it.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise kind(f"{what} ({reason:.300}): {advice}") from error
