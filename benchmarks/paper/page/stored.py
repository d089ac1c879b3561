"""The table in fewer bits and in lower rank, and how large it is beside the FFN it replaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.paper.page.layout import (
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
from benchmarks.paper.page.published import SIZES, TABLE_7, TABLE_8
from edge_memllm.charts import Line, line_chart

_LOSSLESS, _NEARLY = 1e-3, 5e-3  # of perplexity
_ENERGY = 0.9
_PAPER_BITS = {"f16": 16, "int8": 8, "int4": 4}
_BITS = """\
Change of perplexity against an f32 table; the graph is float32, so the table alone is judged.
Scales and levels are counted in the bits. The paper states neither scheme nor group and counts no
scales; its column is Wikitext-2."""
_RANK = """\
A basis for each layer, plain (each token once), coefficients in float16; values stored are U and V,
as the paper counts them."""
_SHARES = f"Rank that holds {_ENERGY:.0%} of the squares of MemoryLLM's rows, by layer:"
_RATIO = """\
A table holds |V| values for each feature of a layer, FFN-M 3 K weights: the table is |V| / 3K times
as large as what it replaces (eq. D.1). It pays because it may lie outside of fast memory, not
because it is small. A small vocabulary makes the ratio smaller, which flatters small models."""


def bits_section(entries: Entries) -> Section:
    """Return the section from the entries of the measurement `bits` (Table 7)."""
    title = "The table in fewer bits (Table 7)"
    runs = {name: each["figures"]["codecs"] for name, each in first_seeds(entries).items()}
    if not runs:
        return Section(title, f"{MISSING}.")
    names = [name for name in next(iter(runs.values())) if name != "f32"]
    head = ["codec", "bits per value", *(VARIANTS[name] for name in runs), "paper, 1B"]
    rows = []
    for name in names:
        first = next(iter(runs.values()))[name]
        cells = [change(increase(run[name]["texts"], run["f32"]["texts"])) for run in runs.values()]
        rows.append([f"`{first['id']}`", f"{first['bits_per_value']:.2f}", *cells, _printed(name)])
    text = f"{_BITS}\n\n{table(head, rows)}"
    return Section(title, text, tuple(_bits_claims(runs)), measured="bits")


def _printed(word: str) -> str:
    bits = _PAPER_BITS.get(word)
    return "" if bits is None else change(TABLE_7[bits] / TABLE_7[16] - 1)


def _bits_claims(runs: Mapping[str, Any]) -> Iterator[Claim]:
    for word, most, paper in (
        ("int8", _LOSSLESS, "8 bits cost nothing"),
        ("int4", _NEARLY, "4 bits cost 0.4 %"),
    ):
        if "memoryllm" not in runs:
            yield Claim(paper, MISSING, "-")
            continue
        run = runs["memoryllm"]
        found = increase(run[word]["texts"], run["f32"]["texts"])
        here = f"MemoryLLM {change(found)} with {run[word]['id']}"
        yield Claim(paper, here, "yes" if found <= most else "no")


def rank_section(entries: Entries) -> Section:
    """Return the section from the entries of the measurement `rank` (Table 8, Fig. 13)."""
    title = "The table in lower rank (Table 8, Fig. 13)"
    runs = {name: each["figures"] for name, each in first_seeds(entries).items()}
    if "memoryllm" not in runs:
        return Section(title, f"{MISSING}.")
    head = ["rank cut", *(f"{VARIANTS[name]}" for name in runs), "values stored", "paper, 1B: C4"]
    rows = []
    for place, cut in enumerate(TABLE_8):
        cells = []
        for run in runs.values():
            kept, whole = run["cuts"][place], run["cuts"][0]
            increased = change(increase(kept["texts"], whole["texts"]))
            cells.append(f"{increased} (r = {kept['rank']})")
        saved = _saved(runs["memoryllm"]["cuts"], place)
        paper = change(TABLE_8[cut] / TABLE_8[0.0] - 1)
        rows.append([f"{cut:.0%}", *cells, saved, paper])
    values = runs["memoryllm"]["singular_values"]
    text = "\n\n".join(
        [
            _RANK,
            table(head, rows),
            image("paper-rank.svg", "Singular values of each layer's rows."),
            f"{_SHARES} {', '.join(f'{share:.0%}' for share in _shares(values))}.",
        ]
    )
    pictures = {"paper-rank.svg": _spectrum(values)}
    return Section(title, text, tuple(_rank_claims(runs["memoryllm"])), pictures, "rank")


def _saved(cuts: Sequence[Mapping[str, Any]], place: int) -> str:
    return f"{cuts[place]['values_per_layer'] / cuts[0]['values_per_layer']:.1%}"


def _shares(values: Sequence[Sequence[float]]) -> list[float]:
    """Of each layer: how much of the rank holds most of the energy."""
    found = []
    for layer in values:
        energy = np.cumsum(np.square(layer))
        found.append((int(np.searchsorted(energy, _ENERGY * energy[-1])) + 1) / len(layer))
    return found


def _rank_claims(run: Mapping[str, Any]) -> Iterator[Claim]:
    cut = run["cuts"][-1]
    found = increase(cut["texts"], run["cuts"][0]["texts"])
    paper = TABLE_8[0.5] / TABLE_8[0.0] - 1
    yield Claim(
        f"Half of the rank costs {change(paper)}",
        f"MemoryLLM {change(found)}",
        "yes" if found <= 1.5 * paper else "no, more",
    )
    shares = _shares(run["singular_values"])
    first, middle, last = shares[0], float(np.mean(shares[1:-1])), shares[-1]
    yield Claim(
        "First and last layers compress better than middle ones",
        f"{_ENERGY:.0%} of the squares in {first:.0%} and {last:.0%} of the rank, those between "
        f"in {middle:.0%}",
        "yes" if max(first, last) < middle else "no",
    )


def _spectrum(values: Sequence[Sequence[float]]) -> str:
    lines = [
        Line(
            f"layer {number}",
            [(place / len(layer), value) for place, value in enumerate(layer, 1)],
            number,
        )
        for number, layer in enumerate(values)
    ]
    names = ("share of the rank", "singular value over the largest")
    return line_chart(
        "Singular values of MemoryLLM's rows", names, lines, logarithmic=True, alone=True
    )


def ratio_section(entries: Entries) -> Section:
    """Return the section on the table's size, from the shapes of the runs."""
    rows = [
        [f"paper, {name}", f"{vocabulary:,}", f"{width:,}", f"{vocabulary / 3 / width:.1f}"]
        for name, (vocabulary, width) in SIZES.items()
    ]
    for variant, run in first_seeds(entries).items():
        model = run["model"]
        if model["memory_width"]:
            vocabulary, width = model["vocabulary"], model["memory_width"]
            ratio = f"{vocabulary / 3 / width:.1f}"
            rows.append([f"here, {VARIANTS[variant]}", f"{vocabulary:,}", f"{width:,}", ratio])
    head = ["", "vocabulary", "width K of FFN-M", "table over FFN-M"]
    return Section("Table against FFN", f"{_RATIO}\n\n{table(head, rows)}")
