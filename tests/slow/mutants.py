"""Bundles with something changed in them: each must be refused, or label; none may crash.

    python -m tests.slow.mutants 10000 --bundle FOLDER

Half of the changes are what befalls files: bytes that flip, ends that are missing, files that are
swapped, or are no files any more. The other half come from somebody who writes the digests anew: a
value of a JSON file becomes another, a field of a graph, a number in a header. Each mutant is
opened and labels a word in a process of its own, whose memory and time have a limit. The last line
says what it came to, as JSON; what crashed is kept, and its change named.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import find_bundle, open_bundle, with_digest
from ercbatch.errors import ErcbatchError
from ercbatch.labeler import smoke_test

_MEMORY = 4 << 30
"""Bytes of address space that a mutant may take beyond what there is."""
_SECONDS = 60
_HOSTILE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -1.5, 1e308),
    *("", "\0", "../../etc/passwd", "/etc/passwd", "a" * 100_000, "\ud800", "é"),
    *([], {}, [[]], {"a": 1}, [0] * 1000),
)
Mutation = Callable[[Path, random.Random], str]
"""Changes a bundle folder; what it did."""


def _pick(folder: Path, draw: random.Random, count: int = 1) -> list[Path]:
    return draw.sample(sorted(p for p in folder.iterdir() if p.suffix != ".md"), count)


def _rewrite(path: Path, data: bytes) -> None:
    """Give a file other bytes; it is a hard link, and the original stays."""
    path.unlink()
    path.write_bytes(data)


def flip(folder: Path, draw: random.Random) -> str:
    """Some bytes become others."""
    (path,) = _pick(folder, draw)
    data = bytearray(path.read_bytes())
    places = draw.sample(range(len(data)), min(len(data), draw.choice((1, 1, 8))))
    for place in places:
        data[place] ^= draw.randrange(1, 256)
    _rewrite(path, bytes(data))
    return f"{path.name}: bytes {places}"


def flip_early(folder: Path, draw: random.Random) -> str:
    """A byte among the first or the last becomes another: headers and trailers."""
    (path,) = _pick(folder, draw)
    data = bytearray(path.read_bytes())
    place = draw.randrange(min(len(data), 512)) * draw.choice((1, -1))
    data[place] ^= draw.randrange(1, 256)
    _rewrite(path, bytes(data))
    return f"{path.name}: byte {place}"


def cut(folder: Path, draw: random.Random) -> str:
    """The end of a file is missing, or some of its middle."""
    (path,) = _pick(folder, draw)
    data = path.read_bytes()
    start = draw.randrange(len(data))
    end = len(data) if draw.random() < 0.5 else min(len(data), start + draw.randrange(1, 1000))
    _rewrite(path, data[:start] + data[end:])
    return f"{path.name}: without {start} to {end}"


def extend(folder: Path, draw: random.Random) -> str:
    """A file has more in it."""
    (path,) = _pick(folder, draw)
    data = path.read_bytes()
    place = draw.choice((len(data), draw.randrange(len(data))))
    more = draw.randbytes(draw.choice((1, 8, 1000)))
    _rewrite(path, data[:place] + more + data[place:])
    return f"{path.name}: {len(more)} bytes more at {place}"


def swap(folder: Path, draw: random.Random) -> str:
    """A file has the content of another."""
    one, other = _pick(folder, draw, 2)
    _rewrite(one, other.read_bytes())
    return f"{one.name}: is {other.name}"


def json_value(folder: Path, draw: random.Random) -> str:
    """A value somewhere in a JSON file is another, or is missing, or has another name."""
    path = draw.choice([p for p in sorted(folder.iterdir()) if p.suffix == ".json"])
    value = json.loads(path.read_bytes())
    places = list(_places(value))
    inside, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.15:
        del inside[key]
        done = f"without {key!r}"
    elif kind < 0.3 and isinstance(inside, dict):
        inside[f"{key}x"] = inside.pop(key)
        done = f"{key!r} has another name"
    else:
        inside[key] = draw.choice(_HOSTILE)
        done = f"{key!r} is {inside[key]!r:.50}"
    _rewrite(path, json.dumps(value, allow_nan=True).encode())
    return f"{path.name}: {done}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            # Of a vocabulary a few are enough: there are other places to choose.
            inner = list(_places(value[key]))
            yield from inner if len(inner) < 5000 else inner[:50]


def graph_field(folder: Path, draw: random.Random) -> str:
    """A field of an ONNX graph is another: a shape, an attribute, a name, an operator."""
    path = draw.choice(sorted(folder.glob("*.onnx")))
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    kind = draw.randrange(6)
    if kind == 0:
        tensor = draw.choice(graph.initializer)
        at = draw.randrange(len(tensor.dims)) if tensor.dims else None
        if at is None:
            tensor.dims.append(draw.choice((0, 2, -1, 2**40)))
        else:
            tensor.dims[at] = draw.choice((0, 1, -1, tensor.dims[at] + 1, 2**31, 2**62))
        done = f"initializer {tensor.name} has dims {list(tensor.dims)}"
    elif kind == 1:
        tensor = draw.choice(graph.initializer)
        tensor.data_type = draw.randrange(0, 24)
        done = f"initializer {tensor.name} has type {tensor.data_type}"
    elif kind == 2:
        node = draw.choice([n for n in graph.node if n.attribute])
        attribute = draw.choice(node.attribute)
        attribute.i = draw.choice((-1, 0, 2, 2**31, -(2**63), 2**63 - 1))
        done = f"{node.op_type} {node.name}: {attribute.name} is {attribute.i}"
    elif kind == 3:
        node, other = draw.choice(graph.node), draw.choice(graph.node)
        node.op_type = other.op_type
        node.domain = other.domain
        done = f"{node.name} is a {node.op_type}"
    elif kind == 4:
        node, other = draw.choice(graph.node), draw.choice(graph.node)
        if node.input:
            node.input[draw.randrange(len(node.input))] = draw.choice(
                [*other.output, *other.input, ""]
            )
        done = f"{node.name} has inputs {list(node.input)}"
    else:
        tensor = draw.choice([t for t in graph.initializer if t.raw_data])
        data = bytearray(tensor.raw_data)
        for _ in range(draw.choice((1, 4, 100))):
            data[draw.randrange(len(data))] = draw.choice((0, 0x7F, 0xFF, draw.randrange(256)))
        tensor.raw_data = bytes(data)
        done = f"initializer {tensor.name} has other values"
    _rewrite(path, model.SerializeToString())
    return f"{path.name}: {done}"


def no_file(folder: Path, draw: random.Random) -> str:
    """A file is missing, or something else is in its place."""
    (path,) = _pick(folder, draw)
    path.unlink()
    kind = draw.choice(("missing", "folder", "pipe", "link", "loop"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "loop":
        path.symlink_to(path.name)
    return f"{path.name}: {kind}"


BEFALLING: tuple[Mutation, ...] = (flip, flip_early, cut, extend, swap, no_file)
WRITTEN: tuple[Mutation, ...] = (
    *(flip_early, cut, extend, swap),
    *(json_value, json_value, json_value, graph_field, graph_field, graph_field),
)
"""After these, digests are written anew."""


def sign(folder: Path) -> None:
    """Write the digests and sizes of all listed files anew, and the description's own."""
    path = folder / manifest.MANIFEST
    try:
        value = json.loads(path.read_bytes())
        for name, entry in value["files"].items():
            data = (folder / name).read_bytes()
            entry["sha256"], entry["size"] = sha256(data).hexdigest(), len(data)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return  # what lists them is itself what was changed
    _rewrite(path, json.dumps(with_digest(value)).encode())


def _open(folder: Path, log: Path) -> None:
    """In a process of its own: open it, label a word, and end with what that came to."""
    with log.open("wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + _MEMORY, have + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(_SECONDS)
    try:
        smoke_test(open_bundle(folder))
    except ErcbatchError as error:
        print(error)
        os._exit(error.exit_code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def mutants(bundle: Path, count: int, seed: int, work: Path) -> dict[str, Any]:
    """Make so many, and open each; what that came to."""
    draw = random.Random(seed)
    forks = multiprocessing.get_context("fork")
    result: Counter[str] = Counter()
    failed: list[str] = []
    for number in range(count):
        folder = work / f"mutant{number}"
        folder.mkdir()
        for path in bundle.iterdir():
            os.link(path, folder / path.name)
        befell = number % 2 == 0
        mutation = draw.choice(BEFALLING if befell else WRITTEN)
        done = f"{mutation.__name__}: {mutation(folder, draw)}"
        if not befell:
            sign(folder)
        log = work / "log"
        process = forks.Process(target=_open, args=(folder, log))
        process.start()
        process.join()
        code = process.exitcode
        said = log.read_text(errors="replace")
        outcome = {0: "labelled", 2: "refused", 4: "refused"}.get(code or 0, f"ended with {code}")
        result[("befallen, " if befell else "written, ") + outcome] += 1
        if outcome not in ("labelled", "refused"):
            failed.append(f"{done}: {outcome}: {said[-600:]}")
            print(f"mutant {number}: {failed[-1]}", file=sys.stderr, flush=True)
            shutil.move(folder, work / f"failed{number}")
            continue
        shutil.rmtree(folder)
    return {"mutants": count, "failed": len(failed), **dict(sorted(result.items()))}


def main() -> None:
    """Make as many mutants as asked, beside the bundle's own copy."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.slow.mutants")
    parser.add_argument("count", type=int)
    parser.add_argument("--bundle", default="mini")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ercbatch-mutants-"))
    original = work / "original"  # on one file system with the hard links to it
    shutil.copytree(find_bundle(args.bundle), original)
    print(f"mutants: in {work}", file=sys.stderr)
    labels_a_word_in_a_child(original)
    print(json.dumps(mutants(original, args.count, args.seed, work)))


def labels_a_word_in_a_child(folder: Path) -> None:
    """See that the bundle labels as it is, without starting a thread here.

    Raises:
        SystemExit: it doesn't.
    """
    with tempfile.TemporaryDirectory() as work:
        process = multiprocessing.get_context("fork").Process(
            target=_open, args=(folder, Path(work) / "log")
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit((Path(work) / "log").read_text())


if __name__ == "__main__":
    main()
