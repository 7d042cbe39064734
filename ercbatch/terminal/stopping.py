"""How a command ends early: errors as sentences and exit codes, and signals.

Like the command line itself, it imports only click and the standard library.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from ercbatch.errors import CLOSED_PIPE, ErcbatchError, OutputError
from ercbatch.terminal.streams import printable

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Failure(click.ClickException):
    """An error of ours, as click shows it."""

    def __init__(self, error: ErcbatchError) -> None:
        # Names of files, labels and nodes are a stranger's; our own messages have lines.
        super().__init__("\n".join(map(printable, str(error).split("\n"))))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads the instance's


class Stopped(BaseException):
    """A signal of this number asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


@contextmanager
def exit_on_errors() -> Iterator[None]:
    """Exit with a one-line message and the exit code of an error."""
    try:
        yield
    except ErcbatchError as error:
        raise Failure(error) from error
    except BrokenPipeError:  # whoever read our output has gone
        _leave_stdout()
        sys.exit(CLOSED_PIPE)
    except OSError as error:  # of a file in no output's care: a working one, or stdout
        advice = "see to it, and try again"
        if error.errno == errno.EBADF:  # stdout is closed
            _leave_stdout()
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "make room, there or by TMPDIR elsewhere, and try again"
        raise Failure(OutputError(f"{error}: {advice}")) from error


def _leave_stdout() -> None:
    """What stdout did not take is lost; Python would complain once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Stopper:
    """Raises `Stopped` when a signal comes: at once, or at the end of what is shielded.

    Where `patience` is set, what is shielded has so many seconds: it may wait for a reader.
    """

    def __init__(self) -> None:
        self._shielded = False
        self._pending: int | None = None
        self.patience: float | None = None
        self.raised: Stopped | None = None

    def __call__(self, number: int, frame: object) -> None:
        """Handle a signal."""
        for stop_signal in _STOP_SIGNALS:
            if signal.getsignal(stop_signal) is self:
                signal.signal(stop_signal, signal.SIG_DFL)
        if not self._shielded:
            self._raise(number)
        self._pending = number
        if self.patience is not None:
            signal.signal(signal.SIGALRM, self._impatient)
            signal.setitimer(signal.ITIMER_REAL, self.patience)

    def _impatient(self, number: int, frame: object) -> None:
        assert self._pending is not None
        self._raise(self._pending)

    def _raise(self, number: int) -> NoReturn:
        self.raised = Stopped(number)
        raise self.raised

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Within it no signal is raised; shields don't nest."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        pending = self._pending
        self.forget()
        if pending is not None:
            self._raise(pending)

    def forget(self) -> None:
        """A signal that came within the shield is raised no more: all is done, say."""
        if self._pending is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._pending = None


@contextmanager
def stoppable() -> Iterator[Stopper]:
    """SIGINT and SIGTERM end the work in order; a second one ends it at once."""
    stop = Stopper()
    handlers = {
        number: signal.signal(number, stop)
        for number in _STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN  # as in the background, or by nohup
    }
    try:
        yield stop
    except BaseException as error:
        # A library that is being imported may make another error of it.
        if stop.raised is None or isinstance(error, SystemExit):
            raise
        click.echo(f"ercbatch: {stop.raised}", err=True)
        sys.exit(128 + stop.raised.number)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
