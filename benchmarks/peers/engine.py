"""What every engine's process does: it opens a model, then answers requests line by line.

A process is started with one argument, a JSON object (see `Order`). It says `{"versions": ...}`
when the model is open, and then answers each line on stdin with one on stdout, until stdin ends.
Whatever goes wrong is `{"error": ...}`, and the end of the process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

Prompts = list[list[list[int]]]
"""Of each dialogue the prompts, as token ids."""

LONGEST = 2048
"""Tokens that an engine must have room for."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a process is told to open."""

    source: str
    """A Hugging Face checkpoint folder, or a bundle."""
    converted: str
    """Where the engine's own form of the checkpoint is, or is to be written."""
    form: str
    threads: int


class Engine(ABC):
    """An engine that has opened a model."""

    packages: ClassVar[tuple[str, ...]]
    """The installed packages whose release counts."""

    @abstractmethod
    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, with the seconds that it took."""


class Generator(Engine):
    """One that generates the likeliest token after each prompt."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """To `{"prompts": Prompts, ...}`: seconds, and the tokens in the order of the prompts."""
        began = time.perf_counter()
        tokens = self.greedy(request["prompts"])
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    @abstractmethod
    def greedy(self, prompts: Prompts) -> list[int]:
        """The likeliest next token of each prompt, in order."""


def serve(open_engine: Callable[[Order], Engine]) -> None:
    """Be the process of an engine."""
    # Libraries print; the answers have a way of their own.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        engine = open_engine(Order(**json.loads(sys.argv[1])))
        say({"versions": {name: version(name) for name in engine.packages}})
        for line in sys.stdin:
            say(engine.answer(json.loads(line)))
    except Exception as error:  # every library has its own; the benchmark reports them
        say({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise SystemExit(1) from error


def convert(order: Order, write: Callable[[Path], None]) -> str:
    """The converted model: `write` makes the folder where it isn't there yet."""
    folder = Path(order.converted)
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        part.rename(folder)
    return str(folder)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with in common."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
