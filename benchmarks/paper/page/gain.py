"""All feed-forward outputs scaled by one factor: recall against reasoning (Table 1, Fig. 7)."""

from __future__ import annotations

import math
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
    table,
)
from benchmarks.paper.page.published import TABLE_1
from edge_memllm.charts import Line, line_chart

# The paper's two groups, and what accuracy a model without knowledge has.
_RECALL = {"ARC-Easy": 0.25}
_REASONING = {"Winogrande": 0.5, "PIQA": 0.5}
_GRAMMAR = {"BLiMP": 0.5}
_ACCURACIES = _RECALL | _REASONING | _GRAMMAR
_ERRORS = 2.0  # standard errors above chance that count
_LEAST = 0.5  # the smallest factor, where models are compared

_INTRODUCTION = """\
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
            _INTRODUCTION,
            _texts_table(runs),
            image("paper-gain.svg", "Perplexity against the factor, one line for each model."),
            _TASKS,
            *(_tasks_table(name, points) for name, points in runs.items()),
            _at_chance(runs),
        ]
    )
    pictures = {"paper-gain.svg": _picture(runs)}
    return Section(title, text, tuple(_claims(runs)), pictures, "gain")


def _relative(points: list[Point]) -> list[tuple[float, float]]:
    """(factor, perplexity over that without scaling)."""
    whole = points[0]["texts"]["together"]["perplexity"]
    return [(each["gain"], each["texts"]["together"]["perplexity"] / whole) for each in points]


def _published() -> list[tuple[float, float]]:
    whole = TABLE_1[1.0]["Wikitext-2"]
    return [(factor, each["Wikitext-2"] / whole) for factor, each in TABLE_1.items()]


def _texts_table(runs: Mapping[str, list[Point]]) -> str:
    columns = [dict(_relative(points)) for points in runs.values()] + [dict(_published())]
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


def _claims(runs: Mapping[str, list[Point]]) -> Iterator[Claim]:
    paper = f"At a factor of {_LEAST} MemoryLLM loses less than Base"
    if {"base", "memoryllm"} <= runs.keys():
        base, memory = (dict(_relative(runs[name]))[_LEAST] for name in ("base", "memoryllm"))
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


def _picture(runs: Mapping[str, list[Point]]) -> str:
    """Factors fall to the right, so that lines part where their names are."""
    curves = [(VARIANTS[name], _relative(points), COLOUR[name]) for name, points in runs.items()]
    curves.append(("paper, MemoryLLM-1B", _published(), COLOUR["paper"]))
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
