"""Line charts of the page, drawn with the pieces of the sweep's pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_memllm.sweep.drawing import at_right, dot, frame, path, picture, spanning

TOKENS = "million tokens"
_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 560, 48, 340
_MOST_DOTS = 12  # of a line; more would only hide it


@dataclass(frozen=True)
class Line:
    """Points (x, y) under a name; `dashed` for figures of others."""

    words: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


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
) -> str:
    """Return a chart as SVG; what is below `lowest` is drawn there, `across` names the x ticks."""
    values = [y for line in lines for _, y in line.points]
    values = values if lowest is None else [max(value, lowest) for value in values]
    y = spanning(values, _BOTTOM, _TOP, logarithmic)
    x = spanning([x for line in lines for x, _ in line.points], _LEFT, _RIGHT)
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
    right = x.place(max(a for line in lines for a, _ in line.points))
    parts += at_right(ends, right + 6, _TOP - 4, _BOTTOM + 8)
    return picture(_WIDTH, _HEIGHT, title, parts, alone=True) + "\n"
