"""The section on clusters: a map of the vocabulary for each layer, and what the clusters mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge_memllm.interpretation.findings import (
    Agreement,
    Cluster,
    Curve,
    GainGroup,
    GainSweep,
    LayerClusters,
    LayerCurves,
    MapPoint,
)
from edge_memllm.interpretation.report.markup import (
    Markup,
    details,
    element,
    figure,
    note,
    panels,
    running,
    scaled,
    table,
    visible,
)
from edge_memllm.svg import COLOURS, SMALL, Box, Line, ink, line_chart, picture, plain, text

_WIDTH, _HEIGHT, _MARGIN = 640, 520, 22
_SMALLEST, _LARGEST = 4.0, 9.0  # pixels of a dot
_COVER = 200.0  # pixels of one dot alone: many are smaller, so that they cover as much
_FEATURES = {
    "coefficients": "which keys a token uses and how strongly",
    "rows": "the row that the table gives for a token",
}
_AGREEMENT = (
    "Purity: the share of tokens whose label is the commonest of their cluster; z, how far it is "
    "above that with shuffled labels, in standard deviations of the shuffles. Mutual information "
    "is adjusted: 0 by chance, 1 for equal partitions. Embeddings: as many clusters of the tokens' "
    "embeddings, for comparison."
)

Placed = Sequence[tuple[MapPoint, int, int]]  # a point, and its pixel

_MANY_LAYERS = 12  # from here on not every layer is named
_WIDE_RANGE = 8.0  # of values: beyond it, a logarithmic axis


def cluster_section(layers: Sequence[LayerClusters]) -> Markup:
    """Return maps with their legends, one panel per layer."""
    return panels(
        "Layer", [(str(each.layer), _layer(each, place)) for place, each in enumerate(layers)]
    )


def cluster_data(layers: Sequence[LayerClusters]) -> dict[str, Any]:
    """Return the words of all points: a pool, and for each cluster of a map which are its points'.

    In the order in which the map's paths have them, whose places the script reads from the map.
    """
    pool: dict[str, int] = {}
    maps = []
    for each in layers:
        groups = _by_cluster(each)
        maps.append(
            [
                [pool.setdefault(visible(point.token.text), len(pool)) for point, _, _ in placed]
                for placed in groups.values()
            ]
        )
    return {"words": list(pool), "maps": maps}


def _layer(found: LayerClusters, number: int) -> Markup:
    words = (
        f"{found.tokens:,} tokens in {len(found.clusters)} clusters by "
        f"{_FEATURES.get(found.features, found.features)}; the map shows {len(found.points):,} of "
        f"them ({found.map_method}). Near on the map is alike; its directions mean nothing."
    )
    drawn = [_map(found, number)] if found.points else []
    return element(
        "div",
        note(words),
        element("div", *drawn, _legend(found), class_="atlas" if drawn else None),
        _agreement(found.agreements),
        _choice(found),
        class_="clusters",
    )


def _map(found: LayerClusters, number: int) -> Markup:
    groups = _by_cluster(found)
    dots = [_dots(cluster, placed) for cluster, placed in groups.items()]
    title = f"Clusters of tokens by the memory of layer {found.layer}"
    drawn = picture(_WIDTH, _HEIGHT, title, [*dots, *_names(groups)], alone=False)
    size = min(_LARGEST, max(_SMALLEST, _COVER / math.sqrt(len(found.points))))
    return element(
        "div",
        element("div", class_="finder"),
        Markup(drawn),
        element("div", class_="tip", hidden=True),
        class_="map",
        style=f"--dot:{size:.1f}px",
        data_map=str(number),
    )


def _dots(cluster: int, placed: Placed) -> str:
    """The points of a cluster as one path of dots, twice for rings."""
    path = "".join(f"M{x} {y}h0" for _, x, y in placed)
    hole = f'<path class="hole" d="{path}"/>' if _is_ring(cluster) else ""
    style = f"stroke:{ink(cluster)}"
    return f'<g class="dots" data-c="{cluster}" style="{style}"><path d="{path}"/>{hole}</g>'


def _names(groups: Mapping[int, Placed]) -> Iterator[str]:
    """The numbers of the clusters in their middle, the largest first, none on another."""
    taken: list[Box] = []
    for cluster, placed in sorted(groups.items(), key=lambda group: -len(group[1])):
        x = statistics.median([x for _, x, _ in placed])
        y = statistics.median([y for _, _, y in placed])
        box = Box(x - 10, y - 8, x + 10, y + 8)
        if not any(box.overlaps(other) for other in taken):
            taken.append(box)
            yield text(x, y + 5, str(cluster + 1), "name middle")


def _is_ring(cluster: int) -> bool:
    """Whether a cluster is told by rings from the one that has its colour too."""
    return cluster % (2 * COLOURS) >= COLOURS


def _by_cluster(found: LayerClusters) -> Mapping[int, Placed]:
    """Points by the number of their cluster, with pixels; equal scales along both axes."""
    points = found.points
    if not points:
        return {}
    left, top = min(each.x for each in points), min(each.y for each in points)
    spans = (max(each.x for each in points) - left, max(each.y for each in points) - top)
    rooms = (_WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN)
    scales = [room / span for room, span in zip(rooms, spans, strict=True) if span > 0]
    scale = min(scales, default=0.0)
    edges = [_MARGIN + (room - scale * span) / 2 for room, span in zip(rooms, spans, strict=True)]
    groups: dict[int, list[tuple[MapPoint, int, int]]] = {}
    for each in sorted(points, key=lambda point: point.cluster):
        x, y = edges[0] + scale * (each.x - left), edges[1] + scale * (each.y - top)
        groups.setdefault(each.cluster, []).append((each, round(x), round(y)))
    return groups


def _legend(found: LayerClusters) -> Markup:
    items = (_entry(place, each) for place, each in enumerate(found.clusters))
    return element("ol", *items, class_="legend-list plot", tabindex="0")


def _entry(place: int, cluster: Cluster) -> Markup:
    ring = " ring" if _is_ring(place) else ""
    return element(
        "li",
        element("span", str(place + 1), class_=f"swatch{ring}", style=f"--swatch:{ink(place)}"),
        element("strong", running(cluster.label)),
        element("span", f" {cluster.size:,} tokens ", class_="soft"),
        element("span", *_samples(cluster), class_="samples"),
        data_c=str(place),
    )


def _samples(cluster: Cluster) -> list[Markup]:
    return [element("bdi", visible(each.text), class_="token") for each in cluster.tokens]


def _agreement(agreements: Sequence[Agreement]) -> Markup:
    if not agreements:
        return Markup("")
    rows = (
        [
            running(each.labelling),
            f"{each.tokens:,}",
            str(each.classes),
            _bars(each.purity, each.embedding_purity, each.shuffled_purity),
            figure(each.purity_z, signed=True),
            _bars(
                each.mutual_information,
                each.embedding_mutual_information,
                each.shuffled_mutual_information,
            ),
        ]
        for each in agreements
    )
    head = ("labelling", "tokens", "classes", "purity", "z", "mutual information")
    caption = "Do the clusters mean something? Agreement with labels that know nothing of memory"
    return element("div", table(head, rows, caption=caption), note(_AGREEMENT), class_="agreement")


def _bars(memory: float, embeddings: float, shuffled: float) -> Markup:
    """What was found beside what it is to be compared with."""
    shown = {"memory": memory, "embeddings": embeddings, "shuffled": shuffled}
    bars = (
        element(
            "span",
            element("b", f"{figure(value)} {name}"),
            class_=f"bar {name}",
            style=scaled(value, 1.0),
        )
        for name, value in shown.items()
    )
    return element("span", *bars)


def _choice(found: LayerClusters) -> Markup:
    rows = ([str(each.clusters), figure(each.value)] for each in found.choices)
    tried = [table(("clusters", "value"), rows, caption="Tried")] if found.choices else []
    return details("How the number of clusters was chosen", note(running(found.rule)), *tried)


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
        names = ("gain on all memory", metric)
        yield _figure(f"{_titled(metric)} as memory fades", names, lines, across, sweep.definition)


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
