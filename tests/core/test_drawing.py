"""Pictures in SVG: scales, labels that can be read, line charts."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.svg import (
    SMALL,
    WIDE,
    Axis,
    Box,
    Form,
    Line,
    at_right,
    beside,
    line_chart,
    per_cent,
    picture,
    spanning,
)


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


def test_words_are_escaped() -> None:
    assert "a &lt; b" in picture(10, 10, "a < b", [], alone=True)


def test_a_picture_that_stands_alone_is_a_file() -> None:
    assert picture(10, 10, "a", [], alone=True).endswith("</svg>\n")
    assert picture(10, 10, "a", [], alone=False).endswith("</svg>")


LINES = (
    Line("first", ((0, 1.0), (1, 3.0)), 0),
    Line("second", ((0, 2.0), (1, 0.5)), 1, dashed=True),
)


@pytest.mark.parametrize("form", [WIDE, SMALL])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_line_chart_keeps_its_lines_inside(form: Form, logarithmic: bool) -> None:
    drawn = line_chart("A", ("x", "y"), LINES, logarithmic=logarithmic, form=form, alone=True)
    ElementTree.fromstring(drawn)
    dots = re.findall(r'<circle class="(full|hollow)" cx="(.+?)" cy="(.+?)"', drawn)
    assert [kind for kind, _, _ in dots] == ["full", "full", "hollow", "hollow"]
    assert all(form.left <= float(x) <= form.right for _, x, _ in dots)
    assert all(form.top <= float(y) <= form.bottom for _, _, y in dots)
    assert (">second</text>" in drawn) == form.named


def test_a_line_chart_says_what_a_dot_is() -> None:
    drawn = line_chart("A", ("x", "y"), LINES[:1], write=per_cent, lowest=2.0)
    assert "<title>first: 1, 300 %</title>" in drawn
    assert "<title>first: 0, 100 %</title>" in drawn  # drawn at 200 %, named as it is
