"""The three standard streams as a run needs them: open, and in nobody's way."""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from typing import Any


def printable(text: str) -> str:
    """Text without characters that could steer a terminal."""
    return "".join(
        " " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c
        for c in text
        if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn")
    )


def steady_streams() -> None:
    """Make the standard streams robust.

    No file takes the number of a closed stream, a failing stderr stops no run, and a character
    that stdout cannot show is not an error.
    """
    for number, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # Reading stdin and writing stdout fail then, as they should; words are lost.
            os.open(os.devnull, mode)  # takes the lowest number that is free
            stream = os.fdopen(number, "r" if number == 0 else "w", closefd=False)
            setattr(sys, ("stdin", "stdout", "stderr")[number], stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        buffer = io.BufferedWriter(_LossyFile(2, "wb", closefd=False))
        encoding = sys.stderr.encoding
        sys.stderr = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)


class _LossyFile(io.FileIO):
    """Whoever read it may leave, or the disk be full: words are lost, and no work."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)
