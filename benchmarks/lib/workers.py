"""Processes that label with a bundle, and the memory of a process (Linux)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ercbatch.dialogues import Dialogue
from ercbatch.errors import ErcbatchError, UsageError
from ercbatch.labeler import Labeler

Dialogues = Callable[[], Iterable[Dialogue]]
_POLL_SECONDS = 0.02
"""Seconds between two looks at a process."""


class Peak:
    """The peak memory of a process, watched until it is closed or the process ends.

    Attributes:
        resident: the peak of what is resident, in MB of 10^6 bytes.
        anonymous: the peak of what is anonymous in it.
    """

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self.resident = 0.0
        self.anonymous = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look once more, and no longer."""
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while self._look() and not self._over.wait(_POLL_SECONDS):
            pass

    def _look(self) -> bool:
        try:
            lines = self._status.read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        fields = dict(line.split(":", 1) for line in lines)
        if "RssAnon" not in fields:  # it has ended, and nobody has waited for it yet
            return False
        # The kernel keeps the peak of the one; that of the other is seen, or missed.
        self.resident = _mb(fields["VmHWM"])
        self.anonymous = max(self.anonymous, _mb(fields["RssAnon"]))
        return True


def _mb(kilobytes: str) -> float:
    return int(kilobytes.split()[0]) * 1024 / 1e6


class Worker:
    """A process that has opened a bundle, and labels the same dialogues whenever it is asked to.

    `dialogues` is called in the process, so it must be possible to pickle it.

    Attributes:
        seconds: how long each round took.
        peak: memory of the process.

    Raises:
        UsageError: the bundle cannot be opened, or the process has ended.
    """

    def __init__(self, bundle: str, threads: int, dialogues: Dialogues) -> None:
        context = get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        arguments = (bundle, threads, dialogues, child_pipe)
        self._process = context.Process(target=_label, args=arguments, daemon=True)
        self._process.start()
        child_pipe.close()  # so that the end of the process is the end of the pipe
        assert self._process.pid is not None  # it has started
        self.peak = Peak(self._process.pid)
        self.seconds: list[float] = []
        failure = self._answer()
        if failure:
            self.close()
            raise UsageError(failure)

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self.close()
            raise UsageError(f"labelling ended with {self._process.exitcode}") from None

    def round(self) -> None:
        """Label all dialogues once.

        Raises:
            UsageError: the process has ended.
        """
        self._pipe.send(None)
        self.seconds.append(self._answer())

    def close(self) -> None:
        """End the process."""
        self.peak.close()
        self._pipe.close()
        self._process.join()


def _label(bundle: str, threads: int, dialogues: Dialogues, pipe: Connection) -> None:
    try:
        labeler = Labeler(bundle, threads=threads)
        next(labeler.label(dialogues()))
    except ErcbatchError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        given = dialogues()
        began = time.perf_counter()
        for _ in labeler.label(given):
            pass
        pipe.send(time.perf_counter() - began)
