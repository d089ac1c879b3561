"""The pictures of a sweep: scales, the Pareto front, labels that can be read."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.sweep.drawing import Axis, Box, at_right, beside, picture, spanning
from edge_memllm.sweep.plots import pareto, size_against_divergence, size_against_perplexity

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points)

    assert set(pareto(points)) == {i for i, point in enumerate(points) if not beaten(point)}


@given(st.lists(st.integers(-(10**8), 10**8).map(lambda n: n / 100), min_size=1, max_size=9))
def test_an_axis_holds_its_values(values: list[float]) -> None:
    axis = spanning(values, 300, 20)
    assert all(20 <= axis.place(value) <= 300 for value in values)
    assert 1 <= len(axis.ticks()) <= 8
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks())


@given(st.lists(st.floats(1e-8, 1e3), min_size=1, max_size=9))
def test_a_logarithmic_axis_has_ticks(values: list[float]) -> None:
    axis = spanning(values, 300, 20, True)
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks())
    assert axis.place(axis.low) == 300
    assert axis.place(axis.high) == pytest.approx(20)


def test_beyond_the_axis_is_its_edge() -> None:
    assert Axis(1, 2, 100, 0).place(5) == 0
    assert Axis(1, 2, 100, 0, True).place(0) == 100


def places(parts: list[str]) -> list[tuple[float, float, str]]:
    found = (re.search(r'<text.* x="(.+?)" y="(.+?)">(.*)<', part) for part in parts)
    return [(float(each[1]), float(each[2]), each[3]) for each in found if each]


def test_labels_of_neighbours_do_not_overlap() -> None:
    points = [(300.0 + 3 * i, 200.0 + i, f"codec-{i}") for i in range(8)]
    parts = [part for part in beside(points, Box(0, 0, 760, 400)) if "<text" in part]
    boxes = []
    for part, (x, y, words) in zip(parts, places(parts), strict=True):
        wide = 7.2 * len(words)
        left = x - wide if "end" in part else x
        boxes.append(Box(left, y - 10.9, left + wide, y + 2.9))
    assert len(boxes) == 8
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not any(a.overlaps(b) for a, b in pairs)


def test_labels_of_lines_are_moved_apart_and_stay_inside() -> None:
    heights = [
        y for _, y, _ in places(at_right([(345.0, str(i), i) for i in range(9)], 500, 0, 350))
    ]
    assert all(later - before >= 15 for before, later in pairwise(heights))
    assert max(heights) <= 354


def result(codec: str, size: int, perplexity: float, kl: float) -> dict[str, object]:
    return {
        "codec": codec,
        "colour": size % 5,
        "table": {"payload_bytes": size * 1_000_000},
        "text": {"perplexity": perplexity, "mean_kl": kl},
    }


def test_what_is_beyond_the_scale_is_named_with_its_figure() -> None:
    results = [result("f16", 9, 20.0, 0.0), result("int8", 5, 20.1, 1e-4), result("x", 1, 99.0, 2)]
    drawn = size_against_perplexity(results, alone=True)
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert "x ↑ 99" in drawn
    other = size_against_divergence(results)
    assert "int8" in other
    assert "f16" not in other  # no place on a logarithmic scale


def test_equal_results_are_drawn_too() -> None:
    one = result("a", 3, 20.0, 0.0)
    assert "a" in size_against_perplexity([one, one])
    assert "<svg" in size_against_divergence([one])


def test_words_are_escaped() -> None:
    assert "a &lt; b" in picture(10, 10, "a < b", [], alone=True)
