"""One layer's memory left out at a time (Figs. 4 and 12, printed as curves only)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.paper.page.layout import (
    COLOUR,
    MISSING,
    VARIANTS,
    Claim,
    Entries,
    Section,
    change,
    first_seeds,
    image,
    increase,
    table,
)
from edge_memllm.charts import Line, line_chart, per_cent

_LOWEST = 1e-3  # of the picture
_NEARLY_FREE = 0.02  # of perplexity, for one layer
_INTRODUCTION = """\
Perplexity on the two kinds of text trained on, when one layer adds no memory; of Base, when one
layer has no FFN. The paper prints curves and no numbers."""


def layers_section(entries: Entries) -> Section:
    """Return the section from the entries of the measurement `drop`."""
    title = "One layer left out (Figs. 4 and 12)"
    runs = {name: _increases(each["figures"]) for name, each in first_seeds(entries).items()}
    if not runs:
        return Section(title, f"{MISSING}.")
    text = "\n\n".join(
        [
            _INTRODUCTION,
            _table(runs),
            image("paper-layers.svg", "Cost of leaving out a layer, one line for each model."),
        ]
    )
    pictures = {"paper-layers.svg": _picture(runs)}
    return Section(title, text, tuple(_claims(runs)), pictures, "drop")


def _increases(figures: Mapping[str, Any]) -> list[float]:
    return [increase(each, figures["whole"]) for each in figures["layers"]]


def _table(runs: Mapping[str, list[float]]) -> str:
    count = max(map(len, runs.values()))
    head = ["left out in layer", *map(str, range(count))]
    return table(head, [[VARIANTS[name], *map(change, each)] for name, each in runs.items()])


def _claims(runs: Mapping[str, list[float]]) -> Iterator[Claim]:
    for variant, paper, verdict in (
        ("memoryllm", "MemoryLLM: the first layers cost most, middle ones are nearly free", _head),
        ("base", "Base: a U, first and last layers cost more than those between", _bowl),
    ):
        if variant not in runs:
            yield Claim(paper, MISSING, "-")
            continue
        first, *between, last = runs[variant]
        middle = sum(between) / len(between)
        here = (
            f"first layer {change(first)}, those between {change(middle)} in the mean, "
            f"last {change(last)}"
        )
        yield Claim(paper, here, verdict(first, middle, last))


def _head(first: float, middle: float, last: float) -> str:
    if first <= 2 * middle or first <= last:
        return "no"
    return "yes" if middle <= _NEARLY_FREE else "the first does, middle ones are not free"


def _bowl(first: float, middle: float, last: float) -> str:
    return "yes" if first > middle and last > middle else "no"


def _picture(runs: Mapping[str, list[float]]) -> str:
    lines = [
        Line(VARIANTS[name], [(float(i), value) for i, value in enumerate(each)], COLOUR[name])
        for name, each in runs.items()
    ]
    count = max(map(len, runs.values()))
    return line_chart(
        "One layer left out",
        ("layer", "increase of perplexity"),
        lines,
        logarithmic=True,
        lowest=_LOWEST,
        across=[(float(layer), str(layer)) for layer in range(count)],
        write=per_cent,
        alone=True,
    )
