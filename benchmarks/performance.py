"""The performance page, from saved results: the same results always give the same page.

    python -m benchmarks.performance docs/performance docs/performance.md

A result is a file `NAME.json` or `NAME-VARIANT.json` with the JSON line that benchmark NAME ends
with; the key `command`, where it has one, is how it was run. `machine.json` is that of
`python -m benchmarks.machine`. `bash benchmarks/performance.sh WORK` makes all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.lib import sections
from benchmarks.lib.sections import Metrics, Section, table
from ercbatch.errors import UsageError
from ercbatch.terminal.stopping import exit_on_errors

_MACHINE = "machine"
_NOT_PAID = Path(__file__).with_name("not_paid.md")
_COMMAND = "command"


@dataclass(frozen=True, slots=True)
class Chapter:
    """A benchmark's place on the page."""

    title: str
    text: str
    section: Section


CHAPTERS: Mapping[str, Chapter] = {
    "throughput": Chapter(
        "Throughput",
        "The same dialogues labelled by different engines, in turns, with the same prompts: peers "
        "get them as token ids, and generate one. Weights are random, so near ties are many. "
        "`baseline` is transformers' `generate`; `best alike` the fastest peer with as many bits; "
        "`limit` what the needed products with weights would take at the machine's own peak for "
        "their type, and over 1 where the machine was slower while that was measured; `agreement` "
        "the share of answers that are those of transformers in float32. What is named stride8 "
        "was measured when the window moved by 8 turns.",
        sections.engines,
    ),
    "limit": Chapter(
        "How near to the machine's limit",
        "What the same arithmetic would take if nothing but it took time.",
        sections.plain,
    ),
    "latency": Chapter(
        "Latency",
        "How soon a label comes: from a command that is only just started, and from a model that "
        "is open.",
        sections.latency,
    ),
    "retrieval": Chapter(
        "Retrieval",
        "`DemonstrationBank.nearest` against exact search and faiss. `ercbatch` has all entries "
        "under one label, to be compared with the others; `balanced` is what labelling does: "
        "results take turns over the labels, and no text is shown to itself; `one label` is "
        "training's same-label rule, which is always exact.",
        sections.retrieval,
    ),
    "scaling": Chapter(
        "Scaling",
        "The same invented sentences as dialogues of different lengths, as more dialogues, and on "
        "more threads. Memory is the peak of what is resident in the process.",
        sections.scaling,
    ),
    "packed": Chapter(
        "Packed against separate prompts",
        "One pass over a dialogue's tree of prompts, or one for each utterance's own prompt.",
        sections.packed,
    ),
    "graph": Chapter(
        "Inside the graph",
        "Where the time of a pass goes, by ONNX Runtime's own profiler.",
        sections.graph,
    ),
}
"""Name of a benchmark -> its chapter, in the page's order; others follow with plain tables."""


@dataclass(frozen=True, slots=True)
class Result:
    """A saved line of a benchmark."""

    name: str
    variant: str
    command: str
    metrics: Metrics

    @property
    def stem(self) -> str:
        """What its files are called."""
        return f"{self.name}-{self.variant}" if self.variant else self.name


def read_results(folder: Path) -> tuple[Metrics, list[Result]]:
    """The machine, and the results in the order of the page.

    Raises:
        UsageError: there is no `machine.json`, nothing beside it, or a file that is no result.
    """
    by_stem: dict[str, Metrics] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: not the JSON line of a benchmark ({error})") from error
        if not isinstance(value, dict):
            raise UsageError(f"{path}: not the JSON line of a benchmark: run it again")
        by_stem[path.stem] = value
    machine = by_stem.pop(_MACHINE, None)
    if machine is None:
        raise UsageError(
            f"{folder}: has no {_MACHINE}.json: write there what `python -m benchmarks.machine` "
            "prints"
        )
    if not by_stem:
        raise UsageError(f"{folder}: has no result of a benchmark")
    results = []
    for stem, value in by_stem.items():
        name, _, variant = stem.partition("-")
        command = value.get(_COMMAND, f"python -m benchmarks.{name}")
        metrics = {k: v for k, v in value.items() if k != _COMMAND}
        results.append(Result(name, variant, command, metrics))
    order = list(CHAPTERS)
    return machine, sorted(
        results, key=lambda r: (order.index(r.name) if r.name in order else len(order), r.stem)
    )


def write_page(results: Path, page: Path) -> None:
    """Write `page`, and its plots into the folder beside it that is called like it.

    Raises:
        UsageError: a result is missing or none.
    """
    machine, saved_results = read_results(results)
    plots = page.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Performance",
        "",
        "Written by `python -m benchmarks.performance` from the figures in "
        f"`{plots.name}/*.json`: change nothing here by hand. `bash benchmarks/performance.sh WORK`"
        " measures one table of each kind again; the other commands stand beside theirs.",
        "",
        *_machine(machine),
    ]
    last_name = None
    for result in saved_results:
        chapter = CHAPTERS.get(result.name) or Chapter(
            sections.words(result.name).capitalize(), "", sections.plain
        )
        if result.name != last_name:
            lines += [f"## {chapter.title}", "", *([chapter.text, ""] if chapter.text else [])]
            last_name = result.name
        if result.variant:
            lines += [f"### {result.variant.replace('-', ' ')}", ""]
        lines += ["```console", f"$ {result.command}", "```", ""]
        try:
            lines += chapter.section(result.metrics, plots / result.stem)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{results / result.stem}.json: not what benchmarks.{result.name} prints "
                f"({type(error).__name__}: {error}): run it again"
            ) from error
    lines += ["## What was tried and did not pay", "", _NOT_PAID.read_text(encoding="utf-8")]
    page.write_text("\n".join(lines), encoding="utf-8")


def _machine(machine: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {release}" for name, release in machine["versions"].items())
    yield "## Machine"
    yield ""
    yield from table(
        ("", ""),
        (
            ("measured", machine["date"]),
            ("processor", f"{machine['processor']} ({', '.join(machine['instructions'])})"),
            ("cores", str(machine["cores"])),
            ("memory", f"{machine['memory_gb']} GB"),
            ("system", machine["system"]),
            ("releases", f"Python {machine['python']}, {versions}"),
        ),
    )


@click.command()
@click.argument("results", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("page", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
def main(results: Path, page: Path) -> None:
    """Write the page OUT from the results in the folder RESULTS."""
    with exit_on_errors():
        write_page(results, page)
    plots = sorted(path.name for path in page.with_suffix("").glob("*.png"))
    click.echo(json.dumps({"page": page.name, "plots": plots}))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.performance")
