"""The section on layers: how they differ, and what becomes of scores as memory fades."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from edge_memllm.charts import SMALL, Line, line_chart, plain
from edge_memllm.drawing import ink
from edge_memllm.interpretation.findings import Curve, GainGroup, GainSweep, LayerCurves
from edge_memllm.interpretation.report.markup import Markup, details, element, figure, table
from edge_memllm.interpretation.report.token_text import running

_MANY_LAYERS = 12  # from here on not every layer is named
_WIDE_RANGE = 8.0  # of values: beyond it, a logarithmic axis


def curve_section(curves: LayerCurves) -> Markup:
    """Return a chart for each curve that was measured, and one table of them all."""
    found = _measured(curves)
    charts = [_layer_chart(curves.layers, each) for each in found]
    if curves.gains is not None:
        charts.extend(_gain_charts(curves.gains))
    parts = [element("div", *charts, class_="charts")]
    if found:
        parts.append(_numbers(curves.layers, found))
    if curves.gains is not None:
        parts.append(_gain_numbers(curves.gains))
    return element("div", *parts)


def _measured(curves: LayerCurves) -> list[Curve]:
    every = (curves.clustering, curves.outliers, curves.norms, curves.dropped)
    return [each for each in every if each is not None]


def _layer_chart(layers: Sequence[int], curve: Curve) -> Markup:
    lines = [_line("measured", layers, curve.values, 0)]
    if curve.control is not None:
        lines.append(_line("control", layers, curve.control, 11, dashed=True))
    step = max(1, math.ceil(len(layers) / _MANY_LAYERS))
    across = [(float(layer), str(layer)) for layer in layers[::step]]
    return _figure(_titled(curve.name), ("layer", ""), lines, across, curve.definition)


def _gain_charts(sweep: GainSweep) -> Iterator[Markup]:
    """One chart per metric: scores in different units have no common axis."""
    for metric in dict.fromkeys(each.metric for each in sweep.groups):
        groups = [each for each in sweep.groups if each.metric == metric]
        # The paper's order: from full memory down.
        lines = [
            _line(each.name, [-gain for gain in sweep.gains], each.values, colour)
            for colour, each in enumerate(groups)
        ]
        across = [(-gain, f"{gain:g}") for gain in sweep.gains]
        words = "All memory multiplied by one number, the paper's alpha; nothing is trained again."
        names = ("gain on all memory", metric)
        yield _figure(f"{_titled(metric)} as memory fades", names, lines, across, words)


def _titled(name: str) -> str:
    return name[:1].upper() + name[1:]


def _figure(
    title: str,
    names: tuple[str, str],
    lines: Sequence[Line],
    across: Sequence[tuple[float, str]],
    words: str,
) -> Markup:
    drawn = [line for line in lines if line.points]
    values = [y for line in drawn for _, y in line.points]
    if not values:
        return element("figure", element("figcaption", running(title), ": not a number"))
    wide = min(values) > 0 and max(values) > _WIDE_RANGE * min(values)
    places = [x for line in drawn for x, _ in line.points]
    inside = [each for each in across if min(places) <= each[0] <= max(places)]
    axis = (names[0], f"{names[1]} (logarithmic)".strip() if wide else names[1])
    chart = line_chart(
        running(title), axis, drawn, logarithmic=wide, across=inside, write=plain, form=SMALL
    )
    keys = [_key(line) for line in drawn] if len(drawn) > 1 else []
    return element(
        "figure",
        Markup(chart),
        element("figcaption", element("div", *keys, class_="keys plot"), running(words)),
    )


def _line(
    words: str,
    places: Sequence[float],
    values: Sequence[float],
    colour: int,
    *,
    dashed: bool = False,
) -> Line:
    points = [(float(x), float(y)) for x, y in zip(places, values, strict=True) if math.isfinite(y)]
    return Line(running(words), points, colour, dashed)


def _key(line: Line) -> Markup:
    kind = "key dashed" if line.dashed else "key"
    return element("span", line.words, class_=kind, style=f"--swatch:{ink(line.colour)}")


def _numbers(layers: Sequence[int], curves: Sequence[Curve]) -> Markup:
    head = ["layer"]
    columns: list[Sequence[float]] = []
    for curve in curves:
        head.append(running(curve.name))
        columns.append(curve.values)
        if curve.control is not None:
            head.append("control")
            columns.append(curve.control)
    rows = (
        [str(layer), *(figure(column[place]) for column in columns)]
        for place, layer in enumerate(layers)
    )
    return details("All figures of the layers", table(head, rows, caption="Layer by layer"))


def _gain_numbers(sweep: GainSweep) -> Markup:
    head = ["group", "metric", *(f"gain {gain:g}" for gain in sweep.gains)]
    rows = (_gain_row(each) for each in sweep.groups)
    scores = table(head, rows, caption="Scores by gain on all memory")
    return details("All figures of the sweep", scores)


def _gain_row(group: GainGroup) -> list[str]:
    return [running(group.name), running(group.metric), *(figure(each) for each in group.values)]
