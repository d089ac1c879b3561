"""What trained models bear: outputs scaled, a layer left out, a table in fewer values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.paper.layout import (
    COLOUR,
    MISSING,
    SIZES,
    TABLE_1,
    TABLE_7,
    TABLE_8,
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
from edge_memllm.svg import Line, line_chart, per_cent

# The paper's two groups, and what accuracy a model without knowledge has.
_RECALL = {"ARC-Easy": 0.25}
_REASONING = {"Winogrande": 0.5, "PIQA": 0.5}
_GRAMMAR = {"BLiMP": 0.5}
_ACCURACIES = _RECALL | _REASONING | _GRAMMAR
_ERRORS = 2.0  # standard errors above chance that count
_LEAST_GAIN = 0.5  # the smallest factor, where models are compared

_GAINS = """\
The same factor on every layer's feed-forward output, without training: the FFN of Base, the memory
of MemoryLLM, both parts of Flex. Change of perplexity on the two kinds of text trained on, beside
the paper's MemoryLLM-1B on Wikitext-2:"""
_TASKS = """\
Tasks. LAMBADA: nats of the last word, mean (these models seldom have it as the likeliest). The
others: accuracy, with the standard error of the first figure. The paper counts LAMBADA and ARC-Easy
as recall, Winogrande and PIQA as reasoning; BLiMP (grammar) is ours. HellaSwag and SciQ (which the
paper calls SiQA) were not at hand; BoolQ's passages are longer than what these models read."""

Point = Mapping[str, Any]


def gain_section(entries: Entries) -> Section:
    """Return the section from the entries of the measurement `gain`."""
    runs = {name: each["figures"]["gains"] for name, each in first_seeds(entries).items()}
    title = "Scaled feed-forward outputs (Table 1, Fig. 7)"
    if not runs:
        return Section(title, f"{MISSING}.")
    text = "\n\n".join(
        [
            _GAINS,
            _texts_table(runs),
            image("paper-gain.svg", "Perplexity against the factor, one line for each model."),
            _TASKS,
            *(_tasks_table(name, points) for name, points in runs.items()),
            _at_chance(runs),
        ]
    )
    pictures = {"paper-gain.svg": _gain_picture(runs)}
    return Section(title, text, tuple(_gain_claims(runs)), pictures, "gain")


def _relative(points: list[Point]) -> list[tuple[float, float]]:
    """(factor, perplexity over that without scaling)."""
    whole = points[0]["texts"]["together"]["perplexity"]
    return [(each["gain"], each["texts"]["together"]["perplexity"] / whole) for each in points]


def _published_gains() -> list[tuple[float, float]]:
    whole = TABLE_1[1.0]["Wikitext-2"]
    return [(factor, each["Wikitext-2"] / whole) for factor, each in TABLE_1.items()]


def _texts_table(runs: Mapping[str, list[Point]]) -> str:
    columns = [dict(_relative(points)) for points in runs.values()] + [dict(_published_gains())]
    head = ["factor", *(VARIANTS[name] for name in runs), "paper, MemoryLLM-1B"]
    rows = [
        [f"{factor:.1f}", *(change(column[factor] - 1) for column in columns)] for factor in TABLE_1
    ]
    return table(head, rows)


def _tasks_table(variant: str, points: list[Point]) -> str:
    rows = []
    for number, point in enumerate(points):
        tasks = point["tasks"]
        cells = [_accuracy(tasks[name], number == 0) for name in _ACCURACIES]
        last_word = math.log(tasks["LAMBADA"]["perplexity"])
        rows.append([f"{point['gain']:.1f}", f"{last_word:.3f}", *cells])
    return table([VARIANTS[variant], "LAMBADA, nats", *_ACCURACIES], rows)


def _accuracy(task: Mapping[str, Any], with_error: bool) -> str:
    return f"{task['acc']:.3f}" + (f" ± {task['acc_stderr']:.3f}" if with_error else "")


def _above_chance(points: list[Point]) -> list[str]:
    tasks = points[0]["tasks"]
    return [
        name
        for name, chance in _ACCURACIES.items()
        if tasks[name]["acc"] > chance + _ERRORS * tasks[name]["acc_stderr"]
    ]


def _at_chance(runs: Mapping[str, list[Point]]) -> str:
    parts = []
    for variant, points in runs.items():
        above = _above_chance(points)
        below = [name for name in _ACCURACIES if name not in above]
        parts.append(
            f"{VARIANTS[variant]}: above chance by two standard errors "
            f"{', '.join(above) or 'nothing'}; at chance, so without meaning, "
            f"{', '.join(below) or 'nothing'}."
        )
    return " ".join(parts)


def _gain_claims(runs: Mapping[str, list[Point]]) -> Iterator[Claim]:
    paper = f"At a factor of {_LEAST_GAIN} MemoryLLM loses less than Base"
    if {"base", "memoryllm"} <= runs.keys():
        base, memory = (dict(_relative(runs[name]))[_LEAST_GAIN] for name in ("base", "memoryllm"))
        here = f"perplexity x {memory:.2f} against x {base:.2f}"
        yield Claim(paper, here, "yes" if memory < base else "no")
    else:
        yield Claim(paper, MISSING, "-")
    paper = "Recall falls with the factor, reasoning hardly"
    if "memoryllm" not in runs:
        yield Claim(paper, MISSING, "-")
        return
    points = runs["memoryllm"]
    able = set(_above_chance(points))
    words = [math.log(each["tasks"]["LAMBADA"]["perplexity"]) for each in points]
    recall = f"LAMBADA {words[-1] - words[0]:+.2f} nats{_falls(points, able & set(_RECALL))}"
    reasoning = _falls(points, able & set(_REASONING)).removeprefix(", ")
    grammar = _falls(points, able & set(_GRAMMAR)).removeprefix(", ")
    parts = (recall, reasoning or "reasoning at chance", grammar or "BLiMP at chance")
    here = f"MemoryLLM: {'; '.join(parts)}"
    yield Claim(paper, here, "see the table" if reasoning else "cannot be told at this size")


def _falls(points: list[Point], names: set[str]) -> str:
    first, last = points[0]["tasks"], points[-1]["tasks"]
    return "".join(
        f", {name} {100 * (last[name]['acc'] - first[name]['acc']):+.1f} points"
        for name in _ACCURACIES
        if name in names
    )


def _gain_picture(runs: Mapping[str, list[Point]]) -> str:
    """Factors fall to the right, so that lines part where their names are."""
    curves = [(VARIANTS[name], _relative(points), COLOUR[name]) for name, points in runs.items()]
    curves.append(("paper, MemoryLLM-1B", _published_gains(), COLOUR["paper"]))
    lines = [
        Line(words, [(-a, b) for a, b in points], colour, dashed=colour == COLOUR["paper"])
        for words, points, colour in curves
    ]
    return line_chart(
        "Scaled feed-forward outputs",
        ("factor on every feed-forward output", "perplexity over that at 1.0"),
        lines,
        logarithmic=True,
        across=[(-factor, f"{factor:.1f}") for factor in TABLE_1],
        alone=True,
    )


_LOWEST = 1e-3  # of the picture
_NEARLY_FREE = 0.02  # of perplexity, for one layer
_LAYERS = """\
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
            _LAYERS,
            _layers_table(runs),
            image("paper-layers.svg", "Cost of leaving out a layer, one line for each model."),
        ]
    )
    pictures = {"paper-layers.svg": _layers_picture(runs)}
    return Section(title, text, tuple(_layers_claims(runs)), pictures, "drop")


def _increases(figures: Mapping[str, Any]) -> list[float]:
    return [increase(each, figures["whole"]) for each in figures["layers"]]


def _layers_table(runs: Mapping[str, list[float]]) -> str:
    count = max(map(len, runs.values()))
    head = ["left out in layer", *map(str, range(count))]
    return table(head, [[VARIANTS[name], *map(change, each)] for name, each in runs.items()])


def _layers_claims(runs: Mapping[str, list[float]]) -> Iterator[Claim]:
    for variant, paper, verdict in (
        (
            "memoryllm",
            "MemoryLLM: the first layers cost most, middle ones are nearly free",
            _costly_first,
        ),
        ("base", "Base: a U, first and last layers cost more than those between", _costly_ends),
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


def _costly_first(first: float, middle: float, last: float) -> str:
    if first <= 2 * middle or first <= last:
        return "no"
    return "yes" if middle <= _NEARLY_FREE else "the first does, middle ones are not free"


def _costly_ends(first: float, middle: float, last: float) -> str:
    return "yes" if first > middle and last > middle else "no"


def _layers_picture(runs: Mapping[str, list[float]]) -> str:
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
