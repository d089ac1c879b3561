"""Small pictures in SVG: a frame with two axes, and labels that do not lie on each other.

Knows numbers, words and colours by their CSS class; nothing of what is shown.

Line charts are made of these pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """\
.plot{--ink:#27313d;--soft:#5a6672;--grid:#e1e5ea;--paper:#ffffff;
--c0:#2f6fc4;--c1:#c9651c;--c2:#3a8f5c;--c3:#a3388f;--c4:#8a6d00;--c5:#c03a3a;
--c6:#0f8a94;--c7:#6a55c9;--c8:#7a5a45;--c9:#4d7a1f;--c10:#b3477a;--c11:#596b80}
@media(prefers-color-scheme:dark){.plot{--ink:#e4e9ef;--soft:#a3adb9;--grid:#353d47;
--paper:#171b21;--c0:#79aef5;--c1:#f0a06a;--c2:#72c996;--c3:#dd8bce;--c4:#d3b750;--c5:#f28b8b;
--c6:#5fcbd3;--c7:#ac9df5;--c8:#c7a38a;--c9:#a4cf6d;--c10:#eb93bb;--c11:#a9b8ca}}
.plot text{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;
fill:var(--soft)}
.plot .name{fill:var(--ink);paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.plot .title{font-size:14px;font-weight:600;fill:var(--ink)}
.plot .end{text-anchor:end}.plot .middle{text-anchor:middle}
.plot .paper{fill:var(--paper)}.plot .grid{stroke:var(--grid)}.plot .axis{stroke:var(--soft)}
.plot .leader{stroke:var(--soft);stroke-width:.7}.plot .line{fill:none;stroke-width:1.8}
.plot .front{fill:none;stroke:var(--ink);stroke-width:1.3;stroke-dasharray:4 4}
.plot .hollow{fill:var(--paper);stroke-width:2}
"""
COLOURS = 12
_LETTER = 7.2  # pixels of a letter of 12px, on the wide side
_LINE = 15  # pixels from one label to the next


_MOST_DOTS = 12  # of a line; more would only hide it


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle on the picture."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether they share more than an edge."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def holds(self, other: Box) -> bool:
        """Whether the other one lies inside."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to pixels: `low` is drawn at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value, kept inside the axis."""
        low, high, value = (self._scaled(each) for each in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values inside, few enough to be read."""
        return _log_ticks(self.low, self.high) if self.logarithmic else _ticks(self.low, self.high)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.logarithmic else value


def spanning(values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> Axis:
    """Return an axis that holds all values with a little room beyond both ends."""
    low, high = min(values), max(values)
    if logarithmic:
        return Axis(low / 1.3, high * 1.3, start, end, True)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - room, high + room, start, end)


def frame(
    title: str,
    axes: tuple[Axis, Axis],
    names: tuple[str, str],
    across: Sequence[tuple[float, str]] | None = None,
    write: Callable[[float], str] = lambda value: f"{value:,.6g}",
) -> list[str]:
    """Return title, grid, ticks and the axes' names; `across` replaces the ticks along x."""
    x, y = axes
    parts = [text(x.start, y.end - 20, title, "title")]
    for value in y.ticks():
        height = y.place(value)
        parts.append(path([(x.start, height), (x.end, height)], "grid"))
        parts.append(text(x.start - 7, height + 4, write(value), "end"))
    lines = 0
    for value, word in across or [(tick, f"{tick:,.6g}") for tick in x.ticks()]:
        parts.append(path([(x.place(value), y.start), (x.place(value), y.start + 4)], "axis"))
        for line, words in enumerate(word.split("\n")):
            lines = max(lines, line)
            parts.append(text(x.place(value), y.start + 18 + _LINE * line, words, "middle"))
    parts.append(path([(x.start, y.start), (x.end, y.start)], "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 40 + _LINE * lines, names[0], "middle"))
    parts.append(text(x.start, y.end - 4, names[1]))
    return parts


def picture(width: int, height: int, title: str, parts: Sequence[str], *, alone: bool) -> str:
    """Return an SVG element; `alone` as a file of its own, with the style in it."""
    style = f"<style>{STYLE}</style>" if alone else ""
    space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    head = (
        f'<svg{space} class="plot" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{style}'
        f'<rect class="paper" width="{width}" height="{height}"/>'
    )
    return "\n".join([head, *parts, "</svg>\n" if alone else "</svg>"])


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Return words at a place; `kind` is a CSS class."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def path(points: Sequence[tuple[float, float]], kind: str, colour: int | None = None) -> str:
    """Return a line through points."""
    drawn = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    style = "" if colour is None else f' style="stroke:{ink(colour)}"'
    return f'<path class="{kind}" d="M{drawn}"{style}/>'


def dot(x: float, y: float, colour: int, *, hollow: bool = False, words: str = "") -> str:
    """Return a dot; `words` are shown when it is pointed at."""
    style = f"stroke:{ink(colour)}" if hollow else f"fill:{ink(colour)}"
    kind = "hollow" if hollow else "full"
    inside = f"<title>{escape(words)}</title>" if words else ""
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
    return f'<circle class="{kind}" {place} style="{style}">{inside}</circle>'


def ink(colour: int) -> str:
    """Return the CSS value of the colour with this number."""
    return f"var(--c{colour % COLOURS})"


def beside(
    points: Sequence[tuple[float, float, str]], room: Box, taken: Sequence[Box] = ()
) -> list[str]:
    """Return a label for each point (x, y, words), none on a point or on another label."""
    boxes = [*taken, *(Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points)]
    parts = []
    for x, y, words in points:
        wide = _LETTER * len(words)
        places = [
            Box(x + dx - side * wide, y + dy - 7, x + dx + (1 - side) * wide, y + dy + 7)
            for far in range(0, 90, 6)
            for side, dx, dy in (
                *((0, 9 + far / 2, -far), (0, 9 + far / 2, far)),
                *((1, -9 - far / 2, -far), (1, -9 - far / 2, far)),
            )
        ]
        free = [
            box
            for box in places
            if room.holds(box) and not any(box.overlaps(other) for other in boxes)
        ]
        box = free[0] if free else places[0]
        boxes.append(box)
        middle = (box.top + box.bottom) / 2
        if abs(middle - y) > 8:
            near = box.left - 2 if box.left > x else box.right + 2
            parts.append(path([(x, y), (near, middle)], "leader"))
        if box.left > x:
            parts.append(text(box.left, middle + 4, words, "name"))
        else:
            parts.append(text(box.right, middle + 4, words, "name end"))
    return parts


def at_right(ends: Sequence[tuple[float, str, int]], x: float, top: float, low: float) -> list[str]:
    """Return a label with its line's colour for each line end (y, words, colour), moved apart."""
    order = sorted(ends)
    heights = _apart([y for y, _, _ in order], top, low)
    parts = []
    for (y, words, colour), height in zip(order, heights, strict=True):
        parts.append(path([(x + 3, y), (x + 18, height)], "leader", colour))
        parts.append(path([(x + 18, height), (x + 30, height)], "line", colour))
        parts.append(text(x + 35, height + 4, words, "name"))
    return parts


def _apart(heights: list[float], top: float, low: float) -> list[float]:
    """Return sorted heights at least one line apart, inside as long as there is room."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + _LINE) if found else max(height, top))
    below = low
    for place in range(len(found) - 1, -1, -1):
        found[place] = min(found[place], below)
        below = found[place] - _LINE
    return found


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        found = [
            float(f"{factor}e{decade}")
            for decade in decades
            for factor in factors
            if low <= float(f"{factor}e{decade}") <= high
        ]
        if len(found) >= 3:
            return found
    return found


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) under a name; `dashed` for figures of others."""

    words: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """Pixels of a chart: its size, where its axes lie, and whether lines have names beside them."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    named: bool = True


WIDE = Form(760, 400, 64, 560, 48, 340)
SMALL = Form(420, 280, 56, 404, 48, 226, named=False)


def plain(value: float) -> str:
    """Write a value of an axis."""
    return f"{value:,.6g}"


def per_cent(value: float) -> str:
    """Write a share of one."""
    return f"{100 * value:,.6g} %"


def line_chart(
    title: str,
    names: tuple[str, str],
    lines: Sequence[Line],
    *,
    logarithmic: bool = False,
    lowest: float | None = None,
    across: Sequence[tuple[float, str]] | None = None,
    write: Callable[[float], str] = plain,
    form: Form = WIDE,
    alone: bool = False,
) -> str:
    """Return a chart as SVG; what is below `lowest` is drawn there, `across` names the x ticks.

    Lines have points, finite ones, and on a logarithmic axis values above zero.
    """
    values = [y for line in lines for _, y in line.points]
    values = values if lowest is None else [max(value, lowest) for value in values]
    y = spanning(values, form.bottom, form.top, logarithmic)
    x = spanning([x for line in lines for x, _ in line.points], form.left, form.right)
    parts = frame(title, (x, y), names, across, write)
    ends = []
    for line in lines:
        points = [(x.place(a), y.place(b)) for a, b in line.points]
        parts.append(path(points, "front" if line.dashed else "line", line.colour))
        if len(points) <= _MOST_DOTS:
            hints = [f"{line.words}: {plain(a)}, {write(b)}" for a, b in line.points]
            parts += [
                dot(*at, line.colour, hollow=line.dashed, words=hint)
                for at, hint in zip(points, hints, strict=True)
            ]
        ends.append((max(points)[1], line.words, line.colour))
    if form.named:
        right = x.place(max(a for line in lines for a, _ in line.points))
        parts += at_right(ends, right + 6, form.top - 4, form.bottom + 8)
    return picture(form.width, form.height, title, parts, alone=alone)
