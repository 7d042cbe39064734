"""The pictures of the performance page: PNG files, the same bytes for the same figures.

The ground is transparent and the text a middling grey, to be read on light pages and on dark ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#3b82f6", "#e8710a", "#2da44e", "#a371f7", "#d1477a", "#0fa3b1", "#b08800")
_GREY = "#808080"
Points = Mapping[str, Sequence[tuple[float, float]]]
"""Line -> its points."""


@contextmanager
def picture(path: Path, columns: int = 1, height: float = 3.6) -> Iterator[list[Axes]]:
    """Axes side by side, to draw on; they are written to `path` at the end."""
    # The object interface: pyplot would choose a backend for the screen, and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * columns if columns > 1 else 7.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(1, columns, squeeze=False)[0])
    yield axes
    for ax in axes:
        ax.set_facecolor("none")
        ax.grid(color=_GREY, alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(which="both", colors=_GREY)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_color(_GREY)
        for edge in ax.spines.values():
            edge.set_color(_GREY)
        legend = ax.get_legend()
        if legend is not None:
            for word in legend.get_texts():
                word.set_color(_GREY)
    # The release of matplotlib in the file would make it another for each.
    figure.savefig(path, dpi=110, transparent=True, metadata={"Software": None})


def bars(
    axes: Axes, values: Mapping[str, float], title: str, label: str, *, highlight: str = ""
) -> None:
    """Horizontal bars in the order given, each with its value at its end.

    Those whose name begins with `highlight` have a colour of their own.
    """
    colours = [_COLOURS[bool(highlight) and name.startswith(highlight)] for name in values]
    containers = axes.barh(list(values), list(values.values()), color=colours, height=0.65)
    axes.bar_label(containers, [f" {value:,.4g}" for value in values.values()], color=_GREY)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.tick_params(axis="y", length=0)
    axes.set(title=title, xlabel=label)


def lines(
    axes: Axes, points: Points, title: str, labels: tuple[str, str], *, log: str = ""
) -> None:
    """Draw lines with a mark at each point.

    `log` names the axes (`x`, `y`, `xy`) that are logarithmic. The others begin at 0.
    """
    from matplotlib.ticker import NullFormatter

    for i, (name, series) in enumerate(points.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(*zip(*series, strict=True), marker="o", markersize=4, color=colour, label=name)
    axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
    ticks = sorted({x for series in points.values() for x, _ in series})
    if "x" in log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        tens = [x for x in ticks if math.log10(x).is_integer()]
        ticks = tens if len(tens) > 1 else ticks
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.12 * max(y for series in points.values() for _, y in series))
    if len(points) > 1:
        axes.legend(frameon=False, fontsize="small")
