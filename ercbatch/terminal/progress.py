"""Signs of life on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_INTERVAL = 10.0
"""Seconds between plain lines."""


class Progress:
    """Counts utterances while a run goes on; a context manager.

    Args:
        total: bytes to read, or None where that is not known.
        quiet: say nothing.
    """

    def __init__(self, total: int | None, *, quiet: bool) -> None:
        self._total = total
        self._quiet = quiet
        self._start = self._reported = time.monotonic()
        self.utterances = 0
        console = Console(stderr=True)
        self._bar = (
            Bar(
                TextColumn("labelling"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            if console.is_terminal and not console.is_dumb_terminal and not quiet
            else None
        )
        self._task = self._bar.add_task("", total=total, speed="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def count(self, utterances: int, rejects: int, done: int) -> None:
        """Count some utterances; `done` bytes of the input lie behind."""
        self.utterances += utterances
        now = time.monotonic()
        if self._quiet or now - self._reported < (0.2 if self._bar else _INTERVAL):
            return
        self._reported = now
        speed = f"{self.utterances:,} utterances, {self.utterances / self.seconds:,.0f}/s"
        if rejects:
            speed += f", {rejects:,} rejected"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, speed=speed)
        else:
            share = f"{done / self._total:.0%}, " if self._total else ""
            print(f"ercbatch: {share}{speed}", file=sys.stderr, flush=True)
