"""What the performance page says of each benchmark: from its figures to Markdown and a plot.

A section takes the figures of one saved JSON line and the path of its plot without an ending. It
draws the plot, and gives the lines of the page, which link to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.plots import bars, lines, picture

Figures = Mapping[str, Any]
Section = Callable[[Figures, Path], list[str]]

_SPEEDS = ("utterances_per_second", "per_second")
"""How benchmarks call the speed of an engine."""
_ASKED = (
    *("model", "template", "demonstrations", "threads", "utterances"),
    *("tokens_separate", "tokens_computed", "tokens_needed"),
)
"""What engines were asked, and what that takes: tokens are for each utterance."""
_SHOWN = 10
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
"""Figure of a search -> its heading and form."""


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table; numbers are right-aligned and in `figure`'s form."""
    cells = [[cell if isinstance(cell, str) else figure(cell) for cell in row] for row in rows]
    right = [
        all(not cell or cell[0] in "-0123456789" for cell in column)
        for column in zip(*cells, strict=True)
    ]
    marks = ["--:" if r else "---" for r in right] or ["---"] * len(headings)
    return [f"| {' | '.join(row)} |" for row in (headings, marks, *cells)] + [""]


def figure(value: Any) -> str:
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


def counted(number: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def words(name: str) -> str:
    """The name of a figure, for people."""
    return name.replace("_", " ")


def plain(figures: Figures, _: Path) -> list[str]:
    """Any benchmark: its figures that are one value each, and a table of those that are named."""
    found = table(
        ("figure", "value"),
        ((words(k), v) for k, v in figures.items() if not isinstance(v, dict | list)),
    )
    for name, value in figures.items():
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            found += named(name, value)
    return found


def named(kind: str, rows: Mapping[str, Figures]) -> list[str]:
    """A table with a row for each name, and a column for each figure that is one value."""
    columns = dict.fromkeys(
        k for row in rows.values() for k, v in row.items() if not isinstance(v, dict | list)
    )
    headings = (words(kind), *(words(column) for column in columns))
    return table(headings, ((name, *(row.get(c) for c in columns)) for name, row in rows.items()))


def engines(figures: Figures, path: Path) -> list[str]:
    """Engines compared: `engines` maps a name to its figures, the speed among them."""
    found: Mapping[str, Figures] = figures["engines"]
    speeds = {
        name: next((own[key] for key in _SPEEDS if own.get(key)), None)
        for name, own in found.items()
    }
    known = {name: float(speed) for name, speed in speeds.items() if speed is not None}
    fastest = dict(sorted(known.items(), key=lambda pair: -pair[1]))
    with picture(path.with_suffix(".png"), height=1.2 + 0.42 * len(fastest)) as (axes,):
        bars(axes, fastest, "Utterances labelled a second", "utterances/s", marked="ours")
    ranked = {name: found[name] for name in (*fastest, *(n for n in found if n not in fastest))}
    said = [f"{key.replace('_', ' ')} {value}" for key in _ASKED if (value := figures.get(key))]
    return [
        *link(path, "utterances a second of each engine"),
        *([f"{'; '.join(said)}.", ""] if said else []),
        *named("engine", ranked),
    ]


def latency(figures: Figures, path: Path) -> list[str]:
    """Cold and warm times."""
    steps: Mapping[str, Figures] = figures["step_seconds"]
    cold = {
        "first label": figures["first_label_seconds"],
        "whole command": figures["whole_command_seconds"],
        **{f"of it: {name}": spread for name, spread in steps.items()},
    }
    warm: Mapping[str, Figures] = figures["warm"]
    with picture(path.with_suffix(".png"), 2) as (left, right):
        medians = {name: 1e3 * spread["median"] for name, spread in steps.items()}
        bars(left, medians, "From a command to its first label", "ms, median")
        points = {
            key.removesuffix("_ms"): [(float(turns), own[key]) for turns, own in warm.items()]
            for key in ("p50_ms", "p95_ms")
        }
        lines(right, points, "One dialogue, model open", ("turns", "ms"))
    return [
        *link(path, "cold start step by step; one dialogue on an open model"),
        f"A dialogue of {figures['turns']} turns, {figures['cold_runs']} fresh processes, "
        f"{counted(figures['threads'], 'thread')}:",
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
            ((counted(int(turns), "turn"), *own.values()) for turns, own in warm.items()),
        ),
    ]


def retrieval(figures: Figures, path: Path) -> list[str]:
    """Recall and speed by the size of the bank."""
    sizes: Mapping[str, Figures] = figures["sizes"]
    recalls: dict[str, list[tuple[float, float]]] = {}
    speeds: dict[str, list[tuple[float, float]]] = {}
    for size, found in sizes.items():
        # Those of which both are drawn come first, to have the same colours in both.
        for name, own in sorted(found["engines"].items(), key=lambda pair: not _inexact(*pair)):
            speeds.setdefault(name, []).append((float(size), own["queries_per_second"]))
            if _inexact(name, own):
                recalls.setdefault(name, []).append((float(size), own["recall_at_3"]))
    with picture(path.with_suffix(".png"), 2) as (left, right):
        lines(left, recalls, "Recall@3 against exact search", ("vectors", "recall@3"), log="x")
        lowest = min(recall for points in recalls.values() for _, recall in points)
        left.set_ylim(min(0.98, lowest - 0.005), 1.002)
        left.axhline(0.99, linestyle=":", color="#808080")
        title = "Speed, one thread"
        lines(right, speeds, title, ("vectors", "queries/s"), log="xy")
    found_lines = [
        *link(path, "recall and speed of retrieval by the size of the bank"),
        f"Texts {figures['texts']}, {figures['dim']} dimensions, {figures['queries']} queries, "
        f"{figures['at_once']} at once, one thread; speeds with three results each. "
        + ", ".join(f"{name} {release}" for name, release in figures["versions"].items())
        + ".",
        "",
    ]
    columns = _SEARCHES.items()
    for size, found in sizes.items():
        found_lines += [f"**{int(size):,} vectors**, {found['embedded']:,} of them embedded:", ""]
        found_lines += table(
            ("search", *(heading for _, (heading, _) in columns)),
            (
                (name, *(f"{own[key]:{form}}" if key in own else "" for key, (_, form) in columns))
                for name, own in found["engines"].items()
            ),
        )
    return found_lines


def _inexact(name: str, own: Figures) -> bool:
    return "exact" not in name and "recall_at_3" in own


def scaling(figures: Figures, path: Path) -> list[str]:
    """Cost by length, by number of dialogues and by threads."""
    groups = {
        "turns": "turns of each dialogue",
        "dialogues": "dialogues in one run",
        "threads": "threads",
    }
    with picture(path.with_suffix(".png"), 3) as axes:
        for one, (group, label) in zip(axes, groups.items(), strict=True):
            found: Mapping[str, Figures] = figures[group]
            points = [(float(n), own["ms_per_utterance"]) for n, own in found.items()]
            log = "" if group == "threads" else "x"
            lines(one, {"": points}, f"Cost by {group}", (label, "ms/utterance"), log=log)
    text = link(path, "cost of an utterance by length, by number of dialogues and by threads")
    flat, ratio = figures["spread"], figures["two_threads_ratio"]
    if flat is not None:
        text += [f"From 10 turns on, the dearest length costs {flat:.1%} more than the cheapest."]
    text += [f"Two threads are {figure(ratio)} times as fast as one.", ""]
    for group, label in groups.items():
        text += named(label, figures[group])
    return text


def packed(figures: Figures, path: Path) -> list[str]:
    """One tree a dialogue against one prompt an utterance."""
    kinds = ("packed", "separate")
    with picture(path.with_suffix(".png"), height=1.9) as (axes,):
        speeds = {kind: float(figures[f"{kind}_per_second"]) for kind in kinds}
        bars(axes, speeds, "One tree a dialogue, or one prompt an utterance", "utterances/s")
    return [*link(path, "packed dialogues against separate prompts"), *plain(figures, path)]


def graph(figures: Figures, path: Path) -> list[str]:
    """Where the time of a pass goes, by operator."""
    found: Mapping[str, Figures] = figures["graphs"]
    text = link(path, "milliseconds of each operator in one pass")
    with picture(path.with_suffix(".png"), len(found)) as axes:
        for one, (name, own) in zip(axes, found.items(), strict=True):
            slowest = list(own["operators"].items())[:_SHOWN]
            taken = {kind: 1e3 * operator["seconds"] for kind, operator in slowest}
            bars(one, taken, f"One pass of {name}", "ms")
    text += [
        f"{figures['utterances']:,} utterances, {figures['tokens']:,} tokens in "
        f"{counted(figures['packs'], 'pack')}, {counted(figures['threads'], 'thread')}.",
        "",
    ]
    for name, own in found.items():
        text += [
            f"**{name}**: {1e3 * own['seconds']:,.0f} ms a pass, {own['products_share']:.1%} of "
            "the nodes' time in matrix products.",
            "",
            *table(
                ("operator", "nodes", "ms"),
                ((kind, o["nodes"], 1e3 * o["seconds"]) for kind, o in own["operators"].items()),
            ),
        ]
    return text


def link(path: Path, what: str) -> list[str]:
    """The plot, as the page shows it from the folder above."""
    return [f"![{what}]({path.parent.name}/{path.name}.png)", ""]
