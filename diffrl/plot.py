"""Numbers as pictures, through matplotlib: laws as densities, learning and sweeps as curves.

Shapes: n grid points.
"""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator
from PIL import Image
from torch import Tensor

_PANEL = 4.4, 3.2  # inches
_DPI = 110
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
_MARKERS = "os^D"
_INK = "#010203"  # stands for the page's own colour of text until the SVG is written
_ON_A_PAGE: dict[Any, Any] = {
    **dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], _INK
    ),
    "grid.color": "#88888855",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "diffrl",  # the same numbers give the same file
}


@dataclass(frozen=True)
class Curve:
    """One density, and how it looks."""

    name: str  # in the legend; the same name in each panel is one entry
    density: Tensor  # [n]
    color: str
    fill: bool = False  # the area below it too, pale
    dashed: bool = False


@dataclass(frozen=True)
class Line:
    """A measure against what it cost or a setting, with half the width of an interval; of equal length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float]


Panels: TypeAlias = Mapping[str, Sequence[Line]]
"""Lines of each panel, by its heading."""

Series: TypeAlias = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""What each measure was, and when: `{measure: (x, y)}`."""


def densities(points: Tensor, curves: Sequence[Sequence[Curve]], titles: Sequence[str]) -> Image.Image:
    """Return one panel a title, side by side on the same axes, and a legend above.

    Args:
        points: `[n]`, rising.
        curves: of each panel, drawn in this order.
        titles: one a panel.
    """
    everything = [curve for panel in curves for curve in panel]
    top = max(float(curve.density.max()) for curve in everything)
    shown = [points[curve.density > 0.002 * top] for curve in everything]
    with matplotlib.rc_context(_STYLE):
        figure = _figure(len(titles), 1)
        panels = figure.subplots(1, len(titles), sharex=True, sharey=True, squeeze=False)[0]
        for axes, panel, title in zip(panels, curves, titles, strict=True):
            for curve in panel:
                style = "--" if curve.dashed else "-"
                axes.plot(points, curve.density, style, color=curve.color, label=curve.name)
                if curve.fill:
                    axes.fill_between(points, curve.density, color=curve.color, alpha=0.2, lw=0)
            axes.set(title=title, xlabel="x")
        panels[0].set(
            ylabel="density",
            xlim=(min(float(x[0]) for x in shown), max(float(x[-1]) for x in shown)),
            ylim=(0, 1.08 * top),
        )
        _legend(figure, len({curve.name for curve in everything}))
        return _picture(figure)


def picture(draw: Callable[..., Figure], *args: Any) -> Image.Image:
    """Return the figure that one of the functions below draws of its arguments, as a picture."""
    with matplotlib.rc_context(_STYLE):
        return _picture(draw(*args))


def svg(draw: Callable[..., Figure], *args: Any) -> str:
    """Return the same as an SVG element whose text takes the page's colour."""
    with matplotlib.rc_context(_STYLE | _ON_A_PAGE):
        return _svg(draw(*args))


def training(panels: Series, x_name: str, columns: int) -> Figure:
    """Return one panel a measure, each on a scale of its own, so many a row."""
    figure, every = _grid(len(panels), columns, 0)
    for axes, (measure, (x, y)) in zip(every, panels.items(), strict=True):
        axes.plot(x, y, marker="o", markersize=3)
        axes.set(title=measure, xlabel=x_name)
        axes.xaxis.set_major_formatter("{x:,.10g}")
    return figure


def learning(panels: Panels, measure: str) -> Figure:
    """Return one panel a currency, `{what was spent: its lines}`, side by side, and a legend above."""
    names = {line.name for lines in panels.values() for line in lines}
    in_a_row = _in_a_row(names, len(panels))
    figure = _figure(len(panels), -(-len(names) // in_a_row))
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (currency, lines) in zip(every, panels.items(), strict=True):
        _draw(axes, lines, panels)
        axes.set(xlabel=currency)
        axes.xaxis.set_major_formatter("{x:,.10g}")
    every[0].set(ylabel=measure)
    _legend(figure, in_a_row)
    return figure


def frontier(panels: Panels, measure: str, gains: Sequence[str] = ()) -> Figure:
    """Return one panel a price, `{price: points by name}`, as `learning`, on logarithmic scales.

    Of the `gains` more is better: they run from right to left, on a scale that is not logarithmic.
    """
    figure = learning(panels, measure)
    for axes, (price, points) in zip(figure.axes, panels.items(), strict=True):
        axes.margins(x=0.1)
        if price in gains:
            axes.invert_xaxis()
            continue
        least = min((x for line in points for x in line.x if x > 0), default=1)
        axes.set_xscale("symlog", linthresh=min(least, 1))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1 else EngFormatter(sep="")(x))
    return figure


def sweep(panels: Panels, setting: str) -> Figure:
    """Return one panel a measure, `{measure: its lines}`, over a setting on a logarithmic scale."""
    figure, every = _grid(len(panels), min(len(panels), 3), 1)
    for axes, (measure, lines) in zip(every, panels.items(), strict=True):
        _draw(axes, lines, panels)
        axes.set(title=measure, xlabel=setting)
        values = sorted({x for line in lines for x in line.x})
        axes.set_xscale("symlog", linthresh=min((x for x in values if x > 0), default=1))  # one may be 0
        axes.set_xticks(values, [f"{x:,.10g}" for x in values], rotation=30)
        axes.xaxis.set_minor_locator(NullLocator())
    _legend(figure, 4)
    return figure


def _draw(axes: Axes, lines: Sequence[Line], panels: Panels) -> None:
    """Draw each line with its interval, in one colour in all `panels`; one point gets an error bar."""
    names = list(dict.fromkeys(line.name for every in panels.values() for line in every))
    for line in lines:
        color = f"C{names.index(line.name)}"
        if len(line.x) == 1:
            marker = _MARKERS[names.index(line.name) // 10 % len(_MARKERS)]  # colours come round after ten
            axes.errorbar(line.x, line.y, line.band, fmt=marker, color=color, label=line.name)
            continue
        low, high = zip(*((y - b, y + b) for y, b in zip(line.y, line.band, strict=True)), strict=True)
        axes.plot(line.x, line.y, color=color, marker="o", markersize=3, label=line.name)
        axes.fill_between(line.x, low, high, color=color, alpha=0.15, lw=0)


def _grid(number: int, columns: int, legend_rows: int) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, so many a row; the last row may be short."""
    rows = -(-number // columns)
    figure = _figure(columns, legend_rows, rows)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[number:]:
        axes.remove()
    return figure, every[:number]


def _figure(columns: int, legend_rows: int, rows: int = 1) -> Figure:
    size = columns * _PANEL[0], rows * _PANEL[1] + 0.25 * legend_rows
    return Figure(size, dpi=_DPI, layout="constrained")


def _in_a_row(names: Collection[str], panels: int) -> int:
    """Return how many names of a legend fit beside each other over so many panels, 4 at most."""
    longest = max(map(len, names))
    return max(1, min(4, int(panels * _PANEL[0] / (0.6 + 0.08 * longest))))  # inches: a mark, a letter


def _legend(figure: Figure, columns: int) -> None:
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside upper left", ncols=columns)


def _picture(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # once; savefig goes through a figure twice, and encodes it
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    element = text.getvalue()
    return element[element.index("<svg") :].replace(_INK, "currentColor")
