"""Where a bundle's graph spends its time, by ONNX Runtime's own profiler.

    python -m benchmarks.graph BUNDLE [BUNDLE or GRAPH.onnx ...] INPUT

The first bundle makes the packs of INPUT as `ercbatch label` would; every graph runs those packs,
the graphs in turns. The nodes are those that ONNX Runtime has made of the graph for this processor.
"""

from __future__ import annotations

import json
import statistics
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import onnxruntime

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import find_bundle
from ercbatch.bundle.onnx_file import check_onnx
from ercbatch.errors import UsageError
from ercbatch.inputs.records import read_dialogues
from ercbatch.labeler import Labeler
from ercbatch.prompts.packs import Pack
from ercbatch.scoring.onnx_scorer import feed, tiles_of
from ercbatch.scoring.sessions import session_options
from ercbatch.terminal.stopping import exit_on_errors

PRODUCTS = frozenset(
    (
        "DynamicQuantizeMatMul",
        "FusedGemm",
        "FusedMatMul",
        "Gemm",
        "MatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
    )
)
"""Operators that are matrix products, with what ONNX Runtime fuses into them."""
_KERNEL = "_kernel_time"
_RUN = "model_run"
"""What the profiler calls the time of a node, and that of a whole run."""
_INPUTS = {"tokens", "positions", "ends", "reads"}
"""What every graph over packs takes."""


@dataclass(frozen=True, slots=True)
class Operator:
    """What the nodes of one operator take over one pass, in seconds."""

    nodes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Operators of a graph, by name, and the time of a whole pass, in seconds."""

    operators: Mapping[str, Operator]
    seconds: float

    @property
    def node_seconds(self) -> float:
        """The time of all nodes; the rest of a pass is the runtime's."""
        return sum(operator.seconds for operator in self.operators.values())

    def to_json(self) -> dict[str, Any]:
        """The metrics, with what of them is in matrix products and what outside."""
        inside = [o for name, o in self.operators.items() if name in PRODUCTS]
        nodes = sum(operator.nodes for operator in self.operators.values())
        nodes_inside = sum(operator.nodes for operator in inside)
        return {
            "seconds": round(self.seconds, 4),
            "products_share": round(sum(o.seconds for o in inside) / self.node_seconds, 4),
            "nodes_in_products": nodes_inside,
            "nodes_outside": nodes - nodes_inside,
            "operators": {
                name: {"nodes": o.nodes, "seconds": round(o.seconds, 5)}
                for name, o in self.operators.items()
            },
        }


def graph_file(name: str) -> Path:
    """The graph of a bundle, or of a file.

    Raises:
        BundleError: no such bundle.
        UsageError: it has no graph.
    """
    path = Path(name) if name.endswith(".onnx") else find_bundle(name) / manifest.MODEL
    if not path.is_file():
        raise UsageError(f"{path} is not there: name a bundle that ONNX Runtime runs, or a graph")
    return path


def open_profiled(graph: Path, threads: int, prefix: Path) -> onnxruntime.InferenceSession:
    """A session as labelling has it, that writes down what every node takes.

    Raises:
        BundleError: the graph asks for what a bundle must not.
        UsageError: it doesn't take packs.
    """
    check_onnx(graph, [path.name for path in graph.parent.iterdir()])
    options = session_options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    if not {value.name for value in session.get_inputs()} >= _INPUTS:
        raise UsageError(f"{graph}: takes no packs: export the bundle as fp32, int8 or int4")
    return session


def read_profile(path: Path, runs: int) -> Profile:
    """What a session has written of passes of `runs` runs each; the first only warms it up.

    A time is the median over the other passes.
    """
    events = json.loads(path.read_text(encoding="utf-8"))
    starts = sorted(event["ts"] for event in events if event["name"] == _RUN)
    pass_starts = starts[::runs]
    pass_seconds = [0.0] * len(pass_starts)
    operator_seconds: dict[str, list[float]] = {}
    nodes: dict[str, set[str]] = {}
    for event in events:
        number = bisect_right(pass_starts, event["ts"]) - 1
        if event["name"] == _RUN:
            pass_seconds[number] += event["dur"] / 1e6
        elif event["cat"] == "Node" and event["name"].endswith(_KERNEL):
            operator = event["args"]["op_name"]
            nodes.setdefault(operator, set()).add(event["name"])
            operator_seconds.setdefault(operator, [0.0] * len(pass_starts))[number] += (
                event["dur"] / 1e6
            )
    seconds = {
        operator: statistics.median(times[1:]) for operator, times in operator_seconds.items()
    }
    slowest = sorted(seconds, key=lambda operator: -seconds[operator])
    operators = {name: Operator(len(nodes[name]), seconds[name]) for name in slowest}
    return Profile(operators, statistics.median(pass_seconds[1:]))


def measure(
    graphs: Mapping[str, Path], packs: Sequence[Pack], threads: int, rounds: int
) -> dict[str, Profile]:
    """The profile of each graph, by name, over `rounds` passes in turns.

    Raises:
        ErcbatchError: a graph cannot be run.
    """
    with TemporaryDirectory() as folder:
        sessions = {
            name: open_profiled(graph, threads, Path(folder, str(number)))
            for number, (name, graph) in enumerate(graphs.items())
        }
        counts = {name: tiles_of(graphs[name], session) for name, session in sessions.items()}
        for _ in range(rounds + 1):
            for name, session in sessions.items():
                for pack in packs:
                    session.run(None, feed(pack, counts[name]))
        return {
            name: read_profile(Path(session.end_profiling()), len(packs))
            for name, session in sessions.items()
        }


def show(profiles: Mapping[str, Profile]) -> Iterator[str]:
    """Lines of a table with a row for each operator.

    For each graph it has the time in ms, the number of nodes and the share of the time.
    """
    for number, (name, profile) in enumerate(profiles.items(), start=1):
        metrics = profile.to_json()
        yield (
            f"{number}. {name}: {1e3 * profile.seconds:,.1f} ms a pass, "
            f"{metrics['products_share']:.1%} of the nodes' time in matrix products; "
            f"{metrics['nodes_in_products']} nodes of them, {metrics['nodes_outside']} others"
        )
    headings = "".join(
        f"{f'{n}. ms':>13}{'nodes':>7}{'share':>8}" for n in range(1, 1 + len(profiles))
    )
    yield f"{'':24}{headings}"
    for operator in dict.fromkeys(
        name for profile in profiles.values() for name in profile.operators
    ):
        cells = ""
        for profile in profiles.values():
            measured = profile.operators.get(operator, Operator(0, 0.0))
            share = measured.seconds / profile.node_seconds
            cells += f"{1e3 * measured.seconds:>13,.1f}{measured.nodes:>7}{share:>8.1%}"
        yield f"{operator:24}{cells}"


@click.command()
@click.argument("graphs", metavar="BUNDLE...", nargs=-1, required=True)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
def main(graphs: tuple[str, ...], source: Path, threads: int, rounds: int) -> None:
    """Measure on the dialogues of SOURCE (JSONL); after the first BUNDLE, graphs may be given."""
    with exit_on_errors():
        dialogues = [dialogue for _, dialogue in read_dialogues(source)]
        engine = Labeler(graphs[0], demonstrations=0).engine
        packs = list(engine.packs(dialogues))
        if not packs:
            raise UsageError(f"{source}: has nothing to label")
        profiles = measure({name: graph_file(name) for name in graphs}, packs, threads, rounds)
    for line in show(profiles):
        click.echo(line)
    result = {
        "utterances": sum(len(dialogue.nonblank) for dialogue in dialogues),
        "packs": len(packs),
        "tokens": sum(len(pack) for pack in packs),
        "threads": threads,
        "rounds": rounds,
        "graphs": {name: profile.to_json() for name, profile in profiles.items()},
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.graph")
