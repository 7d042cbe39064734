"""Kill labelling runs at random moments, let them go on, and compare with an undisturbed run.

    python -m tests.slow.kill_loop 1000

Each run labels the same lines, some of them bad and some blank, in files of several kinds, one of
them damaged. It is killed by SIGKILL after a random time and started again with --resume until it
ends by itself; then its output, its rejects and its counts must be those of the run that nobody
disturbed. It ends when there were so many kills; the last line says what it came to, as JSON.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

ROOT = Path(__file__).resolve().parents[2]
WORDS = "well no yes what it is gone again he said we could so happy sad why never mind oh".split()
_BAD = (b"{", b"[]", b'{"utterances": [{"text": 1}]}', b"\xff\xfe\x00", b'{"utterances": []}')


def lines(count: int, draw: random.Random) -> list[bytes]:
    """Lines of JSONL: dialogues of 1 to 60 turns, and some blank or bad lines."""
    actual = []
    for number in range(count):
        kind = draw.random()
        if kind < 0.05:
            actual.append(draw.choice((b"", b"   ", b"\r")))
        elif kind < 0.1:
            actual.append(draw.choice(_BAD))
        else:
            turns = [
                {
                    "speaker": draw.choice("AB"),
                    "text": " ".join(draw.choices(WORDS, k=draw.randrange(12))),
                }
                for _ in range(draw.choice((1, 2, 5, 10, 60)))
            ]
            actual.append(json.dumps({"id": number, "utterances": turns}).encode())
    return actual


def damaged(data: bytes) -> bytes:
    """Gzip whose second half begins with a block that is none."""
    packer = zlib.compressobj(wbits=31)
    half = len(data) // 2
    first = packer.compress(data[:half]) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + b"\xff" * 8 + packer.compress(data[half:]) + packer.flush()


def write_inputs(folder: Path, count: int, draw: random.Random) -> list[Path]:
    """Four files of lines: plain, gzip, one that is damaged, and Zstandard."""
    folder.mkdir(parents=True)
    paths = []
    for name, pack in (
        ("a.jsonl", bytes),
        ("b.jsonl.gz", gzip.compress),
        ("damaged.jsonl.gz", damaged),
        ("c.jsonl.zst", zstandard.compress),
    ):
        paths.append(folder / name)
        paths[-1].write_bytes(pack(b"\n".join(lines(count, draw)) + b"\n"))
    return paths


@dataclass
class Run:
    """A labelling run whose output is a file in a folder of its own."""

    inputs: list[Path]
    folder: Path
    options: tuple[str, ...] = ()
    kills: int = 0
    after: list[float] = field(default_factory=list)
    """Seconds after which it was killed."""

    @property
    def output(self) -> Path:
        """The file that is written."""
        return self.folder / "out.jsonl"

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start it, or let it go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ercbatch", "label", *map(str, self.inputs)]
        command += ["-o", str(self.output), "--resume", "--quiet", "--commit-every", "0.05"]
        return subprocess.Popen(
            [*command, *self.options],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    def finish(self) -> None:
        """Run it until it ends by itself."""
        process = self.start()
        _, stderr = process.communicate(timeout=600)
        if process.returncode != 3:  # some lines are bad
            raise SystemExit(f"ended with {process.returncode}: {stderr.decode()}")

    def disturb(self, draw: random.Random, seconds: float, most: int) -> None:
        """Kill it after random times, at most so often, and let it go on, until it is done."""
        while self.kills < most:
            process = self.start()
            wait = draw.uniform(0, seconds)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.kills += 1
                self.after.append(wait)
                continue
            finally:
                assert process.stderr is not None
                stderr = process.stderr.read().decode()
                process.stderr.close()
            if process.returncode != 3:
                raise SystemExit(f"after {self.kills} kills: {process.returncode}: {stderr}")
            return
        self.finish()

    def result(self) -> tuple[dict[str, str], dict[str, int]]:
        """What it left: the digests of its files, and its counts."""
        manifest = json.loads((self.folder / "out.jsonl.manifest.json").read_bytes())
        left = sorted(path.name for path in self.folder.iterdir())
        if left != ["out.jsonl", "out.jsonl.manifest.json", "out.jsonl.rejects.jsonl"]:
            raise SystemExit(f"it left {left}")
        digests = {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            for name in ("out.jsonl", "out.jsonl.rejects.jsonl")
        }
        if manifest["output"]["sha256"] != digests["out.jsonl"]:
            raise SystemExit("the manifest has another digest than the output")
        return digests, manifest["counts"]


def kill_loop(folder: Path, kills: int, seed: int, count: int, bundle: str) -> dict[str, object]:
    """Disturb runs until there were so many kills; what it came to.

    Raises:
        SystemExit: a run left something else than the undisturbed one.
    """
    draw = random.Random(seed)
    inputs = write_inputs(folder / "in", count, draw)
    kinds = [
        ("--bundle", bundle, "--threads", "1"),
        ("--bundle", bundle, "--threads", "2", "--scores"),
        ("--bundle", bundle, "--demos", "1"),
    ]
    expected: dict[tuple[str, ...], tuple[float, tuple[dict[str, str], dict[str, int]]]] = {}
    done: list[Run] = []
    killed = 0
    while killed < kills:
        options = kinds[len(done) % len(kinds)]
        if options not in expected:
            calm = Run(inputs, folder / f"calm{len(done)}", options)
            began = time.monotonic()
            calm.finish()
            expected[options] = time.monotonic() - began, calm.result()
        seconds, result = expected[options]
        run = Run(inputs, folder / f"run{len(done)}", options)
        run.disturb(draw, seconds, kills - killed)
        if run.result() != result:
            raise SystemExit(f"{run.folder}: {run.result()}, undisturbed {result}")
        done.append(run)
        killed += run.kills
    return {
        "kills": killed,
        "runs": len(done),
        "most_kills_of_a_run": max(run.kills for run in done),
        "lines": sum(counts["lines"] for _, (_, counts) in expected.values()),
    }


def main() -> None:
    """Kill as often as asked, in a temporary folder that stays where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.slow.kill_loop")
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, default=150, help="of each of four files")
    parser.add_argument("--bundle", default="mini")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ercbatch-kills-"))
    print(f"kill_loop: in {folder}", file=sys.stderr)
    print(json.dumps(kill_loop(folder, args.kills, args.seed, args.lines, args.bundle)))


if __name__ == "__main__":
    main()
