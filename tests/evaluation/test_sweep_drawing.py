"""The pictures of a sweep: the Pareto front, and what is beyond the scale."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.sweep.report import pareto, size_against_divergence, size_against_perplexity

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points)

    assert set(pareto(points)) == {i for i, point in enumerate(points) if not beaten(point)}


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
