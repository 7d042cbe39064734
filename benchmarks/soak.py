"""A long run through the real command: is memory flat, is every line accounted for?

    python -m benchmarks.soak WORK --dialogues 1000000 --bundle FOLDER

Dialogues of 1 to 3 turns are invented, among them some blank and some bad lines, and labelled by
`ercbatch label` into a file. Once the journal says that so many dialogues are labelled, the
resident memory of the process is read (Linux). With --kills the run is killed so often on its way,
some seconds after a commit, and goes on; what that loses is the time since the last commit. At the
end the lines of the outputs are counted, and the ids of the labelled dialogues compared with those
of the input.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import click
import orjson

from benchmarks.lib.sentences import invent
from ercbatch.errors import RESUMABLE
from ercbatch.runs.output import Files

_ROOT = Path(__file__).resolve().parent.parent
_SENTENCES = 5_000
_BAD = b'{"utterances": [{"text": 1}]}'
_MARKS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
"""Labelled dialogues at which memory is read."""


def write_input(path: Path, dialogues: int) -> dict[str, int]:
    """Write so many, a blank line after every hundredth and a bad one after every thousandth."""
    draw = random.Random(0)
    texts = cycle(d.text for d in invent(min(_SENTENCES, 3 * dialogues)))
    blank = bad = 0
    with path.open("wb") as file:
        for number in range(dialogues):
            turns = [
                {"speaker": "AB"[t % 2], "text": next(texts)} for t in range(draw.randint(1, 3))
            ]
            file.write(orjson.dumps({"id": number, "utterances": turns}) + b"\n")
            if number % 100 == 99:
                file.write(b"\n")
                blank += 1
            if number % 1000 == 999:
                file.write(_BAD + b"\n")
                bad += 1
    return {
        "lines": dialogues + blank + bad,
        "labelled": dialogues,
        "rejected": bad,
        "blank": blank,
    }


def labelled(journal: Path) -> int:
    """Dialogues that a journal says are on the disk."""
    try:
        with journal.open("rb") as file:
            file.seek(max(0, journal.stat().st_size - 4096))
            last = file.read().splitlines()[-1]
        return int(json.loads(last)["point"]["counts"]["labelled"])
    except (OSError, KeyError, ValueError, IndexError):
        return 0


def resident_mb(process: int) -> float:
    """Memory of a process that is resident now, in MB of 10^6 bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGESIZE") / 1e6, 1)


def _ids(path: Path) -> Iterator[int]:
    with path.open("rb") as file:
        for line in file:
            yield orjson.loads(line)["id"]


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dialogues", type=click.IntRange(1), default=1_000_000, show_default=True)
@click.option("--bundle", default="mini", show_default=True)
@click.option("--kills", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--after",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="Seconds after a commit was seen within which a run is killed.",
)
def main(work: Path, dialogues: int, bundle: str, kills: int, after: float) -> None:
    """Label so many dialogues in the folder WORK."""
    work.mkdir(parents=True, exist_ok=True)
    source, output = work / "in.jsonl", work / "out.jsonl"
    expected = write_input(source, dialogues)
    command = [sys.executable, "-m", "ercbatch", "label", str(source), "-o", str(output)]
    command += ["--bundle", bundle, "--quiet", "--resume"]
    marks = [mark for mark in _MARKS if mark <= dialogues]
    ends = [dialogues * (k + 1) // (kills + 1) for k in range(kills)]
    memory: dict[str, float] = {}
    lost: list[float] = []
    draw = random.Random(0)
    began = time.monotonic()
    journal = Files.of(output, None).journal
    while True:
        process = subprocess.Popen(command, cwd=_ROOT)
        while process.poll() is None:
            done = labelled(journal)
            while marks and done >= marks[0]:
                memory[str(marks.pop(0))] = resident_mb(process.pid)
            if ends and done >= ends[0]:
                ends.pop(0)
                time.sleep(draw.uniform(0, after))
                with suppress(FileNotFoundError):  # it has ended meanwhile
                    lost.append(time.time() - journal.stat().st_mtime)
                    process.kill()
            last = resident_mb(process.pid) if process.poll() is None else 0.0
            if last:
                memory["last"] = last
            time.sleep(0.2)
        if process.returncode >= 0 and process.returncode != RESUMABLE:
            break
    seconds = time.monotonic() - began
    manifest = json.loads(output.with_name(output.name + ".manifest.json").read_bytes())
    counts = {key: manifest["counts"][key] for key in expected}
    same = counts == expected and all(a == b for a, b in enumerate(_ids(output)))
    low = memory.get("1000", memory["last"])
    result = {
        "bundle": bundle,
        "counts": counts,
        "utterances": manifest["counts"]["utterances"],
        "all_accounted_for": same,
        "kills": len(lost),
        "most_seconds_lost": round(max(lost, default=0.0), 3),
        "resident_mb": memory,
        "growth_mb": round(max(memory.values()) - low, 1),
        "seconds": round(seconds, 1),
    }
    for key, value in result.items():
        click.echo(f"{key:>20}  {value}")
    click.echo(json.dumps(result))
    if process.returncode not in (0, 3) or not same:
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.soak")
