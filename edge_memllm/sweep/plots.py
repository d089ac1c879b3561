"""The pictures of a sweep's report: size against quality, and where the error of the rows is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edge_memllm.drawing import (
    Axis,
    Box,
    at_right,
    beside,
    dot,
    frame,
    path,
    picture,
    spanning,
)
from edge_memllm.sweep.rows import class_name

Result = Mapping[str, Any]

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 736, 48, 376
_LINES_RIGHT = 590  # where lines end that have their names beside them
_MOST_COST = 1.05  # of the best perplexity: what costs more is drawn at the edge
_LEAST_KL = 1e-7  # of a picture: less is rounding


def size_against_perplexity(results: Sequence[Result], *, alone: bool = False) -> str:
    """Return the picture of perplexity by the size of the table, the Pareto front marked."""
    values = [each["text"]["perplexity"] for each in results]
    limit = min(values) * _MOST_COST
    inside = [value for value in values if value <= limit]
    found = spanning(inside, _BOTTOM, _TOP + 8)
    # The best ones lie close together at the bottom: their names want room there.
    y = replace(found, low=found.low - 0.08 * (found.high - found.low), end=_TOP)
    return _scatter(
        "Size against perplexity",
        results,
        values,
        y,
        "perplexity",
        lambda value: f"{value:.4g}",
        alone,
    )


def size_against_divergence(results: Sequence[Result], *, alone: bool = False) -> str:
    """Return the picture of the divergence from the reference by the size of the table.

    Results that do not differ from the reference are not in it: they have no place on its scale.
    """
    shown = [each for each in results if each["text"]["mean_kl"] > _LEAST_KL]
    values = [each["text"]["mean_kl"] for each in shown]
    y = spanning(values or [1e-3, 1.0], _BOTTOM, _TOP, True)
    title = "Size against divergence from the reference"
    name = "mean KL divergence, nats per token"
    return _scatter(title, shown, values, y, name, lambda value: f"{value:.0e}", alone)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points are not beaten by one that is as good in both and better in one.

    In the order of the first figure; of equal points, all.
    """
    order = sorted(range(len(points)), key=lambda place: points[place])
    front: list[int] = []
    for place in order:
        best = points[front[-1]] if front else None
        if best is None or points[place][1] < best[1] or points[place] == best:
            front.append(place)
    return front


def error_by_layer(results: Sequence[Result]) -> str:
    """Return the picture of the rows' relative error in each layer, one line per codec."""
    count = len(results[0]["rows"]["layers"])
    across = [(float(layer), str(layer)) for layer in _few(count)]
    lines = [[layer["relative_rms"] for layer in each["rows"]["layers"]] for each in results]
    return _lines("Error of the rows by layer", results, lines, across, count, "layer")


def error_by_frequency(results: Sequence[Result]) -> str:
    """Return the picture of the rows' relative error by how often the texts have a token."""
    classes = results[0]["rows"]["classes"]
    across = [
        (float(number), f"{class_name(each)}\n({each['tokens']:,})")
        for number, each in enumerate(classes)
    ]
    lines = [[found["relative_rms"] for found in each["rows"]["classes"]] for each in results]
    name = "times the texts have a token (in brackets: how many such tokens there are)"
    title = "Error of the rows by token frequency"
    return _lines(title, results, lines, across, len(classes), name)


def _scatter(
    title: str,
    results: Sequence[Result],
    values: Sequence[float],
    y: Axis,
    name: str,
    write: Callable[[float], str],
    alone: bool,
) -> str:
    sizes = [each["table"]["payload_bytes"] / 1e6 for each in results]
    x = spanning(sizes or [1.0], _LEFT, _RIGHT)
    # Small tables lie close together: their names want room on the left.
    low = x.low - 0.12 * (x.high - x.low)
    x = Axis(max(0.0, low), x.high, x.start, x.end)
    parts = frame(title, (x, y), ("size of the table, MB", name), write=write)
    # A few bytes more or less are no difference: codecs may share parameters, or have none.
    alike = [float(f"{size:.4g}") for size in sizes]
    front = pareto(list(zip(alike, values, strict=True)))
    on_scale = [place for place in front if values[place] <= y.high]
    parts.append(path([(x.place(sizes[i]), y.place(values[i])) for i in on_scale], "front"))
    points = []
    for place, each in enumerate(results):
        at = (x.place(sizes[place]), y.place(values[place]))
        beyond = values[place] > y.high
        words = f"{each['codec']} ↑ {values[place]:.4g}" if beyond else each["codec"]
        hint = f"{each['codec']}: {sizes[place]:.2f} MB, {values[place]:.5g}"
        parts.append(dot(*at, _colour(each), hollow=place not in front, words=hint))
        points.append((*at, words))
    room = Box(_LEFT + 2, _TOP - 16, _WIDTH, _BOTTOM)
    heading = Box(_LEFT, _TOP - 16, _LEFT + 7 * len(name), _TOP)
    parts.extend(beside(points, room, [heading]))
    return picture(_WIDTH, _HEIGHT, title, parts, alone=alone)


def _lines(
    title: str,
    results: Sequence[Result],
    lines: Sequence[Sequence[float]],
    across: Sequence[tuple[float, str]],
    count: int,
    name: str,
) -> str:
    positive = [value for line in lines for value in line if value > 0]
    y = spanning(positive or [1e-3, 1.0], _BOTTOM, _TOP, True)
    x = Axis(-0.4, count - 0.6, _LEFT, _LINES_RIGHT)
    parts = frame(title, (x, y), (name, "rms error / rms of the rows"), across, _per_cent)
    ends = []
    for each, line in zip(results, lines, strict=True):
        points = [(x.place(place), y.place(value)) for place, value in enumerate(line) if value > 0]
        if not points:
            continue
        colour = _colour(each)
        parts.append(path(points, "line", colour))
        parts.extend(dot(*at, colour) for at in (points if len(points) < 12 else points[-1:]))
        ends.append((points[-1][1], each["codec"], colour))
    parts.extend(at_right(ends, _LINES_RIGHT - 20, _TOP - 4, _BOTTOM + 8))
    return picture(_WIDTH, _HEIGHT, title, parts, alone=False)


def _colour(result: Result) -> int:
    found: int = result["colour"]
    return found


def _per_cent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _few(count: int) -> list[int]:
    """Return layers to name: all of a few, else about ten."""
    step = max(1, math.ceil(count / 10))
    return list(range(0, count, step))
