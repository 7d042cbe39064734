"""Does memory stay flat? Short generated dialogues stream through the real command."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import click

_WORDS = (
    "well no yes that was late and then we went home but nobody knew why so I called her".split()
)


def dialogues(count: int) -> Iterator[bytes]:
    """Generated dialogues of two short turns."""
    for number in range(count):
        said = [" ".join(_WORDS[(number * 7 + i) % 17 :][: 2 + (number + i) % 3]) for i in (0, 5)]
        turns = [{"speaker": name, "text": text} for name, text in zip("AB", said, strict=True)]
        yield json.dumps({"id": number, "utterances": turns}).encode() + b"\n"


def resident(process: subprocess.Popen[bytes]) -> float:
    """Resident memory of a process in MB (Linux)."""
    with open(f"/proc/{process.pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


@click.command()
@click.option("--count", default=100_000, show_default=True)
@click.option("--bundle", default="mini", show_default=True)
def main(count: int, bundle: str) -> None:
    """Measure resident memory after 1,000 dialogues and its growth from there."""
    command = [sys.executable, "-m", "ercbatch", "label", "-", "--bundle", bundle, "--quiet"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None

    def feed() -> None:
        assert process.stdin is not None
        for line in dialogues(count):
            process.stdin.write(line)
        process.stdin.close()

    threading.Thread(target=feed, daemon=True).start()
    began, first, most, lines = time.monotonic(), 0.0, 0.0, 0
    for _ in process.stdout:
        lines += 1
        if lines % 1000 == 0:
            now = resident(process)
            first = first or now
            most = max(most, now)
            if lines % 10_000 == 0:
                click.echo(f"{lines:>9,} dialogues  {now:8.1f} MB")
    seconds = time.monotonic() - began
    result = {
        "dialogues": lines,
        "exit_code": process.wait(),
        "resident_mb_after_1000": round(first, 1),
        "growth_mb": round(most - first, 1),
        "dialogues_per_second": round(lines / seconds, 1),
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.memory")
