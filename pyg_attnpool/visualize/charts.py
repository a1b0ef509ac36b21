r"""Charts of a report as SVG that takes its colours and its type from the page around it (extra
:obj:`viz`)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of middle lightness, so that they stand out on light and on dark ground.
COLORS = ("#d9822b", "#2f8f9d", "#8a63b8", "#5b9a4a", "#c4526b", "#8c7a5b", "#4a78c0", "#b09a1e")
# Colours that no series has, in whose place the page puts its own.
INK, QUIET, LINE = "#010101", "#020202", "#030303"
PAGE = {INK: "currentColor", QUIET: "var(--quiet)", LINE: "var(--line)"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}

Points = tuple[Sequence[float] | ndarray, Sequence[float] | ndarray]


def lines(
    series: Mapping[str, Points],
    x: str,
    y: str,
    colors: Mapping[str, str],
    marker: str | None = None,
) -> str:
    r"""A chart of lines as the text of an SVG element.

    Args:
        series (dict): By name the coordinates of the points of a line.
        x (str): What stands at the horizontal axis.
        y (str): What stands at the vertical one.
        colors (dict): By name the colour.
        marker (str, optional): A marker of matplotlib for every point. (default: :obj:`None`)
    """

    def draw(ax: Axes) -> None:
        for name, points in series.items():
            many = marker if marker is not None or len(points[0]) > 1 else "o"
            ax.plot(*points, color=colors[name], label=name, marker=many, markersize=4)
        ax.set_ylim(bottom=0)
        ax.margins(x=0.01)

    return _svg(draw, x, y, len(series))


def histogram(
    values: Mapping[str, ndarray], x: str, y: str, colors: Mapping[str, str], bins: int = 40
) -> str:
    r"""A chart of how values are distributed, as the text of an SVG element.

    Args:
        values (dict): By name an array of values.
        x (str): What stands at the horizontal axis.
        y (str): What stands at the vertical one.
        colors (dict): By name the colour.
        bins (int, optional): The number of bins. (default: :obj:`40`)
    """
    top = max(float(v.max()) for v in values.values())
    edges = np.linspace(0, top or 1.0, bins + 1)

    def draw(ax: Axes) -> None:
        for name, v in values.items():
            counts, _ = np.histogram(v, edges)
            ax.stairs(counts, edges, color=colors[name], label=name, linewidth=1.8)
        ax.set_xlim(0, edges[-1])

    return _svg(draw, x, y, len(values))


def _svg(draw: Any, x: str, y: str, entries: int) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(
            "Charts require 'matplotlib': install it with `pip install \"pyg_attnpool[viz]\"`"
        ) from e
    # The ids of clip paths are hashes: of what is drawn, so that a page is the same every time.
    salt = re.sub(r"\W", "", x + y)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(4.9, 3.1), layout="constrained", facecolor="none")
        ax = figure.subplots()
        ax.set_facecolor("none")
        draw(ax)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        if entries > 1:
            # Above the chart, where it covers no line.
            figure.legend(loc="outside upper left", ncols=min(entries, 4), handlelength=1.3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Ids are those of one page with several charts.
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{salt}-", text)
    for color, name in PAGE.items():
        text = text.replace(color, name)
    label = f"{y} by {x}".replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    text = re.sub(r' width="[^"]*pt"', "", re.sub(r' height="[^"]*pt"', "", text, count=1), count=1)
    return text.replace("<svg", f'<svg class="chart" role="img" aria-label="{label}"', 1)
