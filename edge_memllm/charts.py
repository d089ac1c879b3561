"""Line charts in SVG, made with the pieces of `drawing`; they know nothing of what is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_memllm.drawing import at_right, dot, frame, path, picture, spanning

_MOST_DOTS = 12  # of a line; more would only hide it


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
