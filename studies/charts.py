"""Charts as SVG text that takes its colours and its text size from the page's style sheet.

Every method keeps its colour, dash and marker in all charts, so colour is never the only difference. Elements of a
method carry `data-m`, its number, by which the page's legend hides and shows it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 222  # of the drawing; small enough that its text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36  # LEFT grows with the axis' labels
LETTER = 7.6  # width of one, in a wide font, at the style sheet's size
MOST_POINTS = 140  # of a line; more could not be seen and would only make the page heavy
COLORS = 8  # of the style sheet, see `studies.style`
DASHES = ("5 3", "", "8 3", "2 2", "8 2 2 2", "12 3", "3 1", "6 2 2 2 2 2")  # by number of the method
MARKERS = 6
ROW, LINE, LETTERS = (
    24,
    14,
    20,
)  # of a dot chart: height of a row and of a line of its name, letters of such a line


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: of the method or run.
        style: number of the method, 0 = baseline.
        points: from left to right.
        faint: one of several runs behind their mean.
        spread: half of the error bar at each point; empty for none, NaN where there is none.
        markers: draw the points, too.
    """

    name: str
    style: int
    points: Sequence[Point]
    faint: bool = False
    spread: Sequence[float] = ()
    markers: bool = False


@dataclass(frozen=True)
class Dot:
    """One value in a row of a dot chart, with half of its error bar where it has one."""

    name: str
    style: int
    value: float
    spread: float | None = None


@dataclass(frozen=True)
class DotRow:
    """A row of a dot chart: its name and its values."""

    name: str
    dots: Sequence[Dot] = field(default_factory=list)


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
    """An axis label: 0.5, 12, 40k."""
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:g}"


def inside(x: float, text: str) -> tuple[float, str]:
    """Place and `text-anchor` of a text whose middle should be at `x`, moved so that neither end is cut."""
    half = LETTER * len(text) / 2
    return (0, "start") if x < half else (WIDTH, "end") if x > WIDTH - half else (x, "middle")


def color(style: int) -> str:
    """Class of the style sheet with the colour of a method."""
    return f"s{style % COLORS}"


def _of(style: int) -> str:
    return f'data-m="{style}"'


def dash(style: int) -> str:
    """The attribute that dashes a line of this style; nothing for a full line."""
    pattern = DASHES[(style + style // COLORS) % len(DASHES)]
    return f'stroke-dasharray="{pattern}" ' if pattern else ""


def marker(style: int, x: float, y: float, size: float = 4.2) -> str:
    """The mark of a method around a point: circle, square, triangle, diamond, triangle on its tip, ring."""
    kind = (style + style // COLORS) % MARKERS
    paint = f'class="dot {color(style)}"'
    if kind == 0:
        return f'<circle {paint} cx="{x:g}" cy="{y:g}" r="{size:g}"/>'
    if kind == 1:
        side = 1.8 * size
        return f'<rect {paint} x="{x - side / 2:g}" y="{y - side / 2:g}" width="{side:g}" height="{side:g}"/>'
    if kind == 5:
        return f'<circle class="ring {color(style)}" cx="{x:g}" cy="{y:g}" r="{size - 0.8:g}"/>'
    shape = {
        2: ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
        3: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        4: ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
    }[kind]
    corners = " ".join(f"{x + size * across:g},{y + size * down:g}" for across, down in shape)
    return f'<polygon {paint} points="{corners}"/>'


def sample(style: int) -> str:
    """A short piece of a method's line with its mark, for a legend."""
    return (
        '<svg class="sample" viewBox="0 0 34 14" aria-hidden="true">'
        f'<line class="curve {color(style)}" {dash(style)}x1="1" x2="33" y1="7" y2="7"/>'
        f"{marker(style, 17, 7)}</svg>"
    )


class _Frame:
    """The axes of a chart: places of values, grid and labels."""

    def __init__(
        self,
        xs: Sequence[float],
        y_ticks: Sequence[float],
        unit: str,
        *,
        logarithmic: bool = False,
        pad: float = 0.0,
    ) -> None:
        self.labels = [f"{number(tick)}{unit}" for tick in y_ticks]
        self.left = max(LEFT, 6 + LETTER * max(map(len, self.labels)))
        self.logarithmic = logarithmic
        self.low, self.high = (math.log(min(xs)), math.log(max(xs))) if logarithmic else (0.0, max(xs))
        self.pad = pad
        self.y_ticks = y_ticks

    def place(self, x: float, y: float) -> Point:
        """Where a value stands in the drawing."""
        along = (math.log(x) if self.logarithmic else x) - self.low
        room = WIDTH - self.left - RIGHT - 2 * self.pad
        span = self.high - self.low
        across = self.left + self.pad + (room * along / span if span else room / 2)
        first, last = self.y_ticks[0], self.y_ticks[-1]
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - first) / (last - first)
        return round(across, 1), round(down, 1)

    def draw(self, x_ticks: Sequence[tuple[float, str]], x_name: str) -> list[str]:
        """Grid, labels of both axes, and the name of the horizontal one; its labels break at a space."""
        parts = []
        for tick, label in zip(self.y_ticks, self.labels, strict=True):
            y = self.place(math.exp(self.low) if self.logarithmic else 0, tick)[1]
            parts.append(f'<line class="grid" x1="{self.left:g}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(
                f'<text x="{self.left - 6:g}" y="{y + 4:g}" text-anchor="end">{escape(label)}</text>'
            )
        bottom = HEIGHT - BOTTOM
        lines = 0
        for tick, name in x_ticks:
            for i, line in enumerate(name.split(" ", 1)):
                x, anchor = inside(self.place(tick, self.y_ticks[0])[0], line)
                y = bottom + 15 + LINE * i
                parts.append(f'<text x="{x:g}" y="{y}" text-anchor="{anchor}">{escape(line)}</text>')
                lines = max(lines, i + 1)
        middle, y = (self.left + WIDTH - RIGHT) / 2, bottom + 18 + LINE * lines
        parts.append(f'<text x="{middle:g}" y="{y}" text-anchor="middle">{escape(x_name)}</text>')
        return parts


def _svg(parts: Sequence[str], label: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return "\n".join([opening, *parts, "</svg>"])


def line_chart(lines: Sequence[Line], what: str, unit: str = "", *, zero: bool = True) -> str:
    """An SVG of lines over training steps.

    Args:
        lines: At least one with a point; faint ones are drawn below the others.
        what: The quantity, for readers who cannot see the drawing.
        unit: After the numbers of the vertical axis.
        zero: Let the vertical axis begin at zero, or below.
    """
    drawn = [(line, thin_out(line.points)) for line in sorted(lines, key=lambda line: not line.faint)]
    drawn = [(line, points) for line, points in drawn if points]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    frame = _Frame(xs, nice_ticks(min([*ys, 0.0] if zero else ys), max(ys)), unit)
    ticks = [tick for tick in nice_ticks(0, max(xs)) if tick <= max(xs)]  # the axis ends with the training
    ends = "; ".join(
        f"{line.name} ends at {points[-1][1]:.3g}{unit}" for line, points in drawn if not line.faint
    )
    parts = frame.draw([(tick, number(tick)) for tick in ticks], "step")
    for line, points in drawn:
        parts.append(_curve(line, [frame.place(x, y) for x, y in points]))
    return _svg(parts, f"{what} over training steps. {ends}")


def _curve(line: Line, places: Sequence[Point], bars: Sequence[str] = ()) -> str:
    """A line with its name as tooltip; a mark where there is a single point."""
    title = f"<title>{escape(line.name)}</title>"
    kind = "thin" if line.faint else "curve"
    shapes = [*bars]
    if len(places) > 1:
        path = " ".join(f"{x:g},{y:g}" for x, y in places)
        dashes = "" if line.faint else dash(line.style)
        shapes.append(f'<polyline class="{kind} {color(line.style)}" {dashes}points="{path}"/>')
    if line.markers or len(places) == 1:
        shapes += [marker(line.style, x, y) for x, y in places]
    return f"<g {_of(line.style)}>{title}{''.join(shapes)}</g>"


def fraction_chart(lines: Sequence[Line], names: Sequence[tuple[float, str]], what: str) -> str:
    """An SVG of mIoU in percent over the number of labeled images, on a logarithmic axis, with error bars.

    Args:
        lines: x = labeled images (1 or more), y = percent, `spread` = half of the error bar.
        names: labeled images and how the axis names them.
        what: The quantity, for readers who cannot see the drawing.
    """
    lows, highs = [], []
    for line in lines:
        spread = line.spread or [math.nan] * len(line.points)
        for (_, y), half in zip(line.points, spread, strict=True):
            reach = half if math.isfinite(half) else 0.0
            lows.append(y - reach)
            highs.append(y + reach)
    frame = _Frame(
        [x for x, _ in names], nice_ticks(min(lows), max(highs)), " %", logarithmic=True, pad=26
    )  # so that marks do not leave the drawing
    parts = frame.draw(names, "labeled images")
    said = []
    for i, line in enumerate(lines):
        spread = line.spread or [math.nan] * len(line.points)
        aside = 4 * (i - (len(lines) - 1) / 2)  # side by side, so that error bars do not hide each other
        places = [_moved(frame.place(x, y), aside) for x, y in line.points]
        bars = [
            _whisker(
                _moved(frame.place(x, y - half), aside), _moved(frame.place(x, y + half), aside), line.style
            )
            for (x, y), half in zip(line.points, spread, strict=True)
            if math.isfinite(half) and half > 0
        ]
        parts.append(_curve(line, places, bars))
        said.append(f"{line.name}: " + ", ".join(f"{y:.1f} % at {x:g}" for x, y in line.points))
    return _svg(parts, f"{what} over labeled images. {'; '.join(said)}", height=HEIGHT + LINE)


def _moved(place: Point, across: float) -> Point:
    return round(place[0] + across, 1), place[1]


def _whisker(low: Point, high: Point, style: int) -> str:
    """An error bar with caps, upright or level."""
    (x1, y1), (x2, y2) = low, high
    bar = f'<line class="whisker {color(style)}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'
    across, down = (3.5, 0.0) if x1 == x2 else (0.0, 3.5)
    caps = "".join(
        f'<line class="whisker {color(style)}" x1="{x - across:g}" y1="{y - down:g}" '
        f'x2="{x + across:g}" y2="{y + down:g}"/>'
        for x, y in (low, high)
    )
    return bar + caps


def dot_chart(rows: Sequence[DotRow], what: str, unit: str = "", *, zero: str = "") -> str:
    """An SVG with a row of dots per name, and error bars where given.

    Args:
        rows: At least one dot in all.
        what: The quantity, for readers who cannot see the drawing.
        unit: After the numbers of the axis.
        zero: Name of the line at zero, for gains; empty draws none and lets the axis begin anywhere.
    """
    names = [textwrap.wrap(_cut(row.name, 4 * LETTERS), LETTERS) or [""] for row in rows]
    left = 14 + LETTER * max(len(line) for lines in names for line in lines)
    rooms = [max(ROW, LINE * len(lines) + 6) for lines in names]
    height = 8 + sum(rooms) + BOTTOM + (14 if zero else 0)
    values = [end for row in rows for dot in row.dots for end in
              (dot.value - (dot.spread or 0), dot.value + (dot.spread or 0))]  # fmt: skip
    ticks = nice_ticks(min([*values, 0.0] if zero else values), max([*values, 0.0] if zero else values))

    def across(value: float) -> float:
        return round(left + (WIDTH - RIGHT - left - 8) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    top, bottom = (14 if zero else 0) + 4, height - BOTTOM
    parts = []
    for tick in ticks:
        x = across(tick)
        kind = "axis" if zero and tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 15}" text-anchor="middle">{number(tick)}</text>')
    if zero:
        shown = _cut(zero, int(WIDTH / LETTER))
        x, anchor = inside(across(0), shown)
        parts.append(f'<text x="{x:g}" y="12" text-anchor="{anchor}">{escape(shown)}</text>')
    parts.append(
        f'<text x="{(left + WIDTH - RIGHT) / 2:g}" y="{height - 4}" text-anchor="middle">{escape(unit)}</text>'
    )
    said = []
    for row, lines, room in zip(rows, names, rooms, strict=True):
        y, top = top + room / 2, top + room
        for i, line in enumerate(lines):
            down = y + 4 + LINE * (i - (len(lines) - 1) / 2)
            parts.append(f'<text x="{left - 8:g}" y="{down:g}" text-anchor="end">{escape(line)}</text>')
        for dot in row.dots:
            shapes = [f"<title>{escape(f'{row.name}, {dot.name}: {dot.value:.2f}')}</title>"]
            if dot.spread:
                ends = (across(dot.value - dot.spread), y), (across(dot.value + dot.spread), y)
                shapes.append(_whisker(*ends, dot.style))
            shapes.append(marker(dot.style, across(dot.value), y))
            parts.append(f"<g {_of(dot.style)}>{''.join(shapes)}</g>")
            said.append(f"{row.name}{f', {dot.name}' if dot.name != row.name else ''}: {dot.value:.1f}")
    return _svg(parts, f"{what}. {'; '.join(said)}", WIDTH, height)


def _cut(text: str, longest: int) -> str:
    """A long text without its middle, for names often begin alike and differ in their end."""
    if len(text) <= longest:
        return text
    end = (longest - 1) // 2
    return f"{text[: longest - 1 - end]}…{text[-end:]}"
