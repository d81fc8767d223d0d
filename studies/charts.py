"""Line charts as SVG text that takes its colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 214  # of the drawing; small enough that its text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MOST_POINTS = 240  # of a line; more could not be seen and would only make the page heavy
DASHES = ("5 3", "", "2 2", "8 2 2 2", "1 2", "10 3")  # by style: colour is never the only difference


@dataclass(frozen=True)
class Line:
    """One line: its name, the number of its style (0 = baseline) and its points from left to right."""

    name: str
    style: int
    points: Sequence[Point]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def thin_out(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points; groups of neighbours are replaced by their mean, the last point stays."""
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) <= most:
        return finite
    size = math.ceil(len(finite) / (most - 1))
    groups = [finite[i : i + size] for i in range(0, len(finite) - 1, size)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]
    return [*means, finite[-1]]


def number(value: float) -> str:
    """An axis label: 0.5, 12, 4k."""
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:g}"


def line_chart(lines: Sequence[Line], what: str, unit: str = "") -> str:
    """An SVG of lines over training steps.

    Args:
        lines: At least one with a point.
        what: The quantity, for readers who cannot see the drawing.
        unit: After the numbers of the vertical axis.
    """
    drawn = [Line(line.name, line.style, thin_out(line.points)) for line in lines]
    drawn = [line for line in drawn if line.points]
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x_ticks = nice_ticks(0, max(xs))
    y_ticks = nice_ticks(min(0.0, *ys), max(ys))
    x_end = max(xs)  # the axis ends with the training, not at the next round number

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / (x_end or 1.0)
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(across, 1), round(down, 1)

    ends = "; ".join(f"{line.name} ends at {line.points[-1][1]:.3g}{unit}" for line in drawn)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{what} over training steps. {ends}")}">'
    ]
    for tick in y_ticks:
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{number(tick)}{escape(unit)}</text>'
        )
    for tick in x_ticks:
        if tick <= x_end:
            x, bottom = place(tick, y_ticks[0])
            anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
            parts.append(f'<text x="{x}" y="{bottom + 15}" text-anchor="{anchor}">{number(tick)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>')
    for line in drawn:
        parts.append(_draw(line, [place(x, y) for x, y in line.points]))
    return "\n".join([*parts, "</svg>"])


def _draw(line: Line, places: Sequence[Point]) -> str:
    """A line with its name as tooltip; a dot where there is a single point."""
    title = f"<title>{escape(line.name)}</title>"
    if len(places) == 1:
        x, y = places[0]
        return f'<circle class="dot s{line.style}" cx="{x}" cy="{y}" r="3.5">{title}</circle>'
    path = " ".join(f"{x},{y}" for x, y in places)
    return f'<polyline class="curve s{line.style}" {dash(line.style)}points="{path}">{title}</polyline>'


def dash(style: int) -> str:
    """The attribute that dashes a line of this style; nothing for a full line."""
    pattern = DASHES[style % len(DASHES)]
    return f'stroke-dasharray="{pattern}" ' if pattern else ""


def sample(style: int) -> str:
    """A short piece of a line, for a legend."""
    return (
        '<svg class="sample" viewBox="0 0 30 10" aria-hidden="true">'
        f'<line class="curve s{style}" {dash(style)}x1="1" x2="29" y1="5" y2="5"/></svg>'
    )
