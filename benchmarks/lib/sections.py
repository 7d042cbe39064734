"""Sections of the performance page: the metrics of each benchmark as Markdown and a plot.

A section takes the metrics of one saved JSON line and the path of its plot without an ending. It
draws the plot, and gives the lines of the page, which link to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.plots import bars, lines, picture

Metrics = Mapping[str, Any]
Section = Callable[[Metrics, Path], list[str]]

_SPEED_KEYS = ("utterances_per_second", "per_second")
"""How benchmarks call the speed of an engine."""
_SETTINGS = (
    *("model", "template", "demonstrations", "threads", "utterances"),
    *("tokens_separate", "tokens_computed", "tokens_needed"),
)
"""What engines were asked, and what that takes: tokens are for each utterance."""
_MAX_OPERATORS = 10
"""Operators in a picture, at most."""

_SEARCHES = {
    "recall_at_1": ("recall@1", ".4f"),
    "recall_at_3": ("recall@3", ".4f"),
    "recall_at_5": ("recall@5", ".4f"),
    "queries_per_second": ("queries/s", ",.0f"),
    "times_exact": ("times `exact`", ",.2f"),
    "times_exact_alone": ("times `exact, alone`", ",.2f"),
    "build_seconds": ("build, s", ",.1f"),
    "load_seconds": ("load, s", ",.2f"),
    "disk_mb": ("disk, MB", ",.1f"),
}
"""Metric of a search -> its heading and form."""


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table; numbers are right-aligned and in `format_number`'s form."""
    cells = [
        [cell if isinstance(cell, str) else format_number(cell) for cell in row] for row in rows
    ]
    right = [
        all(not cell or cell[0] in "-0123456789" for cell in column)
        for column in zip(*cells, strict=True)
    ]
    marks = ["--:" if r else "---" for r in right] or ["---"] * len(headings)
    return [f"| {' | '.join(row)} |" for row in (headings, marks, *cells)] + [""]


def format_number(value: Any) -> str:
    """A number with as many places as tell something; anything else as it is; None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.1f}"
    if abs(value) >= 10:
        return f"{value:.2f}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 0.001 else f"{value:.2g}"


def pluralize(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def words(name: str) -> str:
    """The name of a metric, for people."""
    return name.replace("_", " ")


def plain(metrics: Metrics, _: Path) -> list[str]:
    """Any benchmark: its metrics that are one value each, and a table of those that are named."""
    page_lines = table(
        ("figure", "value"),
        ((words(k), v) for k, v in metrics.items() if not isinstance(v, dict | list)),
    )
    for name, value in metrics.items():
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            page_lines += table_by_name(name, value)
    return page_lines


def table_by_name(kind: str, rows: Mapping[str, Metrics]) -> list[str]:
    """A table with a row for each name, and a column for each metric that is one value."""
    columns = dict.fromkeys(
        k for row in rows.values() for k, v in row.items() if not isinstance(v, dict | list)
    )
    headings = (words(kind), *(words(column) for column in columns))
    return table(headings, ((name, *(row.get(c) for c in columns)) for name, row in rows.items()))


def engines(metrics: Metrics, path: Path) -> list[str]:
    """Engines compared: `engines` maps a name to its metrics, the speed among them."""
    engine_metrics: Mapping[str, Metrics] = metrics["engines"]
    speeds = {
        name: next((row[key] for key in _SPEED_KEYS if row.get(key)), None)
        for name, row in engine_metrics.items()
    }
    known_speeds = {name: float(speed) for name, speed in speeds.items() if speed is not None}
    fastest = dict(sorted(known_speeds.items(), key=lambda pair: -pair[1]))
    with picture(path.with_suffix(".png"), height=1.2 + 0.42 * len(fastest)) as (axes,):
        bars(axes, fastest, "Utterances labelled a second", "utterances/s", highlight="ours")
    ranked = {
        name: engine_metrics[name]
        for name in (*fastest, *(n for n in engine_metrics if n not in fastest))
    }
    settings = [
        f"{key.replace('_', ' ')} {value}" for key in _SETTINGS if (value := metrics.get(key))
    ]
    return [
        *link(path, "utterances a second of each engine"),
        *([f"{'; '.join(settings)}.", ""] if settings else []),
        *table_by_name("engine", ranked),
    ]


def latency(metrics: Metrics, path: Path) -> list[str]:
    """Cold and warm times."""
    steps: Mapping[str, Metrics] = metrics["step_seconds"]
    cold = {
        "first label": metrics["first_label_seconds"],
        "whole command": metrics["whole_command_seconds"],
        **{f"of it: {name}": spread for name, spread in steps.items()},
    }
    warm: Mapping[str, Metrics] = metrics["warm"]
    with picture(path.with_suffix(".png"), 2) as (left, right):
        medians = {name: 1e3 * spread["median"] for name, spread in steps.items()}
        bars(left, medians, "From a command to its first label", "ms, median")
        points = {
            key.removesuffix("_ms"): [(float(turns), times[key]) for turns, times in warm.items()]
            for key in ("p50_ms", "p95_ms")
        }
        lines(right, points, "One dialogue, model open", ("turns", "ms"))
    return [
        *link(path, "cold start step by step; one dialogue on an open model"),
        f"A dialogue of {metrics['turns']} turns, {metrics['cold_runs']} fresh processes, "
        f"{pluralize(metrics['threads'], 'thread')}:",
        "",
        *table(
            ("cold, s", "median", "min", "max"),
            (
                (k, *(f"{v[part]:.3f}" for part in ("median", "min", "max")))
                for k, v in cold.items()
            ),
        ),
        *table(
            ("one dialogue, model open", "median, ms", "95th of 100, ms"),
            ((pluralize(int(turns), "turn"), *times.values()) for turns, times in warm.items()),
        ),
    ]


def retrieval(metrics: Metrics, path: Path) -> list[str]:
    """Recall and speed by the size of the bank."""
    sizes: Mapping[str, Metrics] = metrics["sizes"]
    recalls: dict[str, list[tuple[float, float]]] = {}
    speeds: dict[str, list[tuple[float, float]]] = {}
    for size, result in sizes.items():
        # Those of which both are drawn come first, to have the same colours in both.
        for name, row in sorted(result["engines"].items(), key=lambda pair: not _inexact(*pair)):
            speeds.setdefault(name, []).append((float(size), row["queries_per_second"]))
            if _inexact(name, row):
                recalls.setdefault(name, []).append((float(size), row["recall_at_3"]))
    with picture(path.with_suffix(".png"), 2) as (left, right):
        lines(left, recalls, "Recall@3 against exact search", ("vectors", "recall@3"), log="x")
        lowest = min(recall for points in recalls.values() for _, recall in points)
        left.set_ylim(min(0.98, lowest - 0.005), 1.002)
        left.axhline(0.99, linestyle=":", color="#808080")
        title = "Speed, one thread"
        lines(right, speeds, title, ("vectors", "queries/s"), log="xy")
    page_lines = [
        *link(path, "recall and speed of retrieval by the size of the bank"),
        f"Texts {metrics['texts']}, {metrics['dim']} dimensions, {metrics['queries']} queries, "
        f"{metrics['retrieved_together']} at once, one thread; speeds with three results each. "
        + ", ".join(f"{name} {release}" for name, release in metrics["versions"].items())
        + ".",
        "",
    ]
    columns = _SEARCHES.items()
    for size, result in sizes.items():
        page_lines += [f"**{int(size):,} vectors**, {result['embedded']:,} of them embedded:", ""]
        page_lines += table(
            ("search", *(heading for _, (heading, _) in columns)),
            (
                (name, *(f"{row[key]:{form}}" if key in row else "" for key, (_, form) in columns))
                for name, row in result["engines"].items()
            ),
        )
    return page_lines


def _inexact(name: str, row: Metrics) -> bool:
    return "exact" not in name and "recall_at_3" in row


def scaling(metrics: Metrics, path: Path) -> list[str]:
    """Cost by length, by number of dialogues and by threads."""
    groups = {
        "turns": "turns of each dialogue",
        "dialogues": "dialogues in one run",
        "threads": "threads",
    }
    with picture(path.with_suffix(".png"), 3) as axes:
        for ax, (group, label) in zip(axes, groups.items(), strict=True):
            cases: Mapping[str, Metrics] = metrics[group]
            points = [(float(n), case["ms_per_utterance"]) for n, case in cases.items()]
            log = "" if group == "threads" else "x"
            lines(ax, {"": points}, f"Cost by {group}", (label, "ms/utterance"), log=log)
    text = link(path, "cost of an utterance by length, by number of dialogues and by threads")
    spread, ratio = metrics["spread"], metrics["two_threads_ratio"]
    if spread is not None:
        text += [f"From 10 turns on, the dearest length costs {spread:.1%} more than the cheapest."]
    text += [f"Two threads are {format_number(ratio)} times as fast as one.", ""]
    for group, label in groups.items():
        text += table_by_name(label, metrics[group])
    return text


def packed(metrics: Metrics, path: Path) -> list[str]:
    """One tree a dialogue against one prompt an utterance."""
    kinds = ("packed", "separate")
    with picture(path.with_suffix(".png"), height=1.9) as (axes,):
        speeds = {kind: float(metrics[f"{kind}_per_second"]) for kind in kinds}
        bars(axes, speeds, "One tree a dialogue, or one prompt an utterance", "utterances/s")
    return [*link(path, "packed dialogues against separate prompts"), *plain(metrics, path)]


def graph(metrics: Metrics, path: Path) -> list[str]:
    """Where the time of a pass goes, by operator."""
    graphs: Mapping[str, Metrics] = metrics["graphs"]
    text = link(path, "milliseconds of each operator in one pass")
    with picture(path.with_suffix(".png"), len(graphs)) as axes:
        for ax, (name, profile) in zip(axes, graphs.items(), strict=True):
            slowest = list(profile["operators"].items())[:_MAX_OPERATORS]
            milliseconds = {kind: 1e3 * operator["seconds"] for kind, operator in slowest}
            bars(ax, milliseconds, f"One pass of {name}", "ms")
    text += [
        f"{metrics['utterances']:,} utterances, {metrics['tokens']:,} tokens in "
        f"{pluralize(metrics['packs'], 'pack')}, {pluralize(metrics['threads'], 'thread')}.",
        "",
    ]
    for name, profile in graphs.items():
        text += [
            f"**{name}**: {1e3 * profile['seconds']:,.0f} ms a pass, "
            f"{profile['products_share']:.1%} of the nodes' time in matrix products.",
            "",
            *table(
                ("operator", "nodes", "ms"),
                (
                    (kind, o["nodes"], 1e3 * o["seconds"])
                    for kind, o in profile["operators"].items()
                ),
            ),
        ]
    return text


def link(path: Path, description: str) -> list[str]:
    """The plot, as the page shows it from the folder above."""
    return [f"![{description}]({path.parent.name}/{path.name}.png)", ""]
