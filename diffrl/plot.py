"""Curves as a picture, with Pillow alone: densities on a common axis, one panel a label.

Shapes: n grid points.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_WIDTH, _HEIGHT = 460, 320  # of a panel, pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 40, 40  # margins of the axes in it
_LEGEND = 34
_FINE = 4  # drawn so many times larger and reduced: Pillow's own lines have stairs
_INK, _FAINT = (51, 51, 51), (225, 225, 225)


@dataclass(frozen=True)
class Curve:
    """One density, and how it looks."""

    name: str  # in the legend; the same name in each panel is one entry
    density: Tensor  # [n]
    color: tuple[int, int, int]
    fill: bool = False  # the area below it too, pale
    dashed: bool = False


def panels(points: Tensor, curves: Sequence[Sequence[Curve]], titles: Sequence[str]) -> Image.Image:
    """Return one panel a title, side by side on the same axes, and a legend above.

    Args:
        points: `[n]`, rising.
        curves: of each panel, drawn in this order.
        titles: one a panel.
    """
    everything = [curve for panel in curves for curve in panel]
    top = 1.08 * max(float(curve.density.max()) for curve in everything)
    shown = [points[curve.density > 0.002 * top] for curve in everything]
    low, high = min(float(x[0]) for x in shown), max(float(x[-1]) for x in shown)
    canvas = Image.new("RGB", (len(titles) * _WIDTH * _FINE, (_HEIGHT + _LEGEND) * _FINE), "white")
    for number, (panel, title) in enumerate(zip(curves, titles, strict=True)):
        axes = _Axes(canvas, number * _WIDTH, _LEGEND, (low, high), (0.0, top))
        axes.frame(title)
        for curve in panel:
            axes.curve(points, curve)
    _legend(canvas, {curve.name: curve for curve in everything}.values())
    return canvas.resize((canvas.width // _FINE, canvas.height // _FINE), Image.Resampling.LANCZOS)


class _Axes:
    """One panel: data to pixels, and what is drawn in it."""

    def __init__(
        self,
        canvas: Image.Image,
        left: int,
        top: int,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
    ) -> None:
        self.canvas, self.pen = canvas, ImageDraw.Draw(canvas, "RGBA")
        self.x_range, self.y_range = x_range, y_range
        self.box = (
            (left + _LEFT) * _FINE,
            (top + _TOP) * _FINE,
            (left + _WIDTH - _RIGHT) * _FINE,
            (top + _HEIGHT - _BOTTOM) * _FINE,
        )

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.box[0] + (value - low) / (high - low) * (self.box[2] - self.box[0])

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.box[3] - (value - low) / (high - low) * (self.box[3] - self.box[1])

    def frame(self, title: str) -> None:
        """Draw the axes, their ticks and words, and the panel's title."""
        left, top, right, bottom = self.box
        font, small = _font(14), _font(12)
        for value in _ticks(*self.y_range):
            self.pen.line([(left, self.y(value)), (right, self.y(value))], _FAINT, _FINE)
            self.pen.text((left - 7 * _FINE, self.y(value)), f"{value:g}", _INK, small, anchor="rm")
        for value in _ticks(*self.x_range):
            self.pen.line([(self.x(value), bottom), (self.x(value), bottom + 4 * _FINE)], _INK, _FINE)
            self.pen.text((self.x(value), bottom + 6 * _FINE), f"{value:g}", _INK, small, anchor="ma")
        self.pen.line([(left, bottom), (right, bottom)], _INK, _FINE)
        self.pen.text(((left + right) / 2, bottom + 22 * _FINE), "x", _INK, small, anchor="ma")
        self.pen.text((left + 6 * _FINE, top), "density", _INK, small, anchor="la")
        self.pen.text((left, top - 12 * _FINE), title, _INK, font, anchor="ls")

    def curve(self, points: Tensor, curve: Curve) -> None:
        """Draw one density, inside the axes only."""
        low, high = self.x_range
        inside = (points >= low) & (points <= high)
        line = [
            (self.x(x), self.y(density))
            for x, density in zip(points[inside].tolist(), curve.density[inside].tolist(), strict=True)
        ]
        if curve.fill:
            bottom = self.box[3]
            area = [(line[0][0], bottom), *line, (line[-1][0], bottom)]
            self.pen.polygon(area, (*curve.color, 60))
        _stroke(self.pen, line, curve)


def _stroke(pen: ImageDraw.ImageDraw, line: list[tuple[float, float]], curve: Curve) -> None:
    """Draw a polyline, in dashes of equal length if asked for."""
    width = 2 * _FINE
    if not curve.dashed:
        pen.line(line, curve.color, width, joint="curve")
        return
    dash, travelled, piece = 7 * _FINE, 0.0, [line[0]]
    for a, b in pairwise(line):
        before, travelled = travelled, travelled + math.dist(a, b)
        piece.append(b)
        if before // dash != travelled // dash:
            if int(before // dash) % 2 == 0:
                pen.line(piece, curve.color, width, joint="curve")
            piece = [b]


def _legend(canvas: Image.Image, curves: Collection[Curve]) -> None:
    pen, font = ImageDraw.Draw(canvas, "RGBA"), _font(13)
    left, middle = float(_LEFT * _FINE), (_LEGEND - 12) * _FINE
    for curve in curves:
        line = [(left + step * _FINE, float(middle)) for step in range(29)]
        if curve.fill:
            pen.rectangle((left, middle - 6 * _FINE, line[-1][0], middle + 6 * _FINE), (*curve.color, 60))
        _stroke(pen, line, curve)
        pen.text((line[-1][0] + 7 * _FINE, middle), curve.name, _INK, font, anchor="lm")
        left = line[-1][0] + 30 * _FINE + font.getlength(curve.name)


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers in a range."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(m * power - rough))
    return [round(k * step, 9) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size * _FINE)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
