"""The page and the picture of a conversion's figures; made of the stored results alone."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.dense.first_page import first_verdict, won_words
from benchmarks.dense.page_parts import gap_words, is_beyond
from edge_memllm.svg import at_right, dot, frame, path, picture, spanning, text

Results = Mapping[str, Any]

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 540, 48, 356
_WARM_UP = 0.4  # million tokens from scratch that are left out: beyond the picture


_SOURCES = "`conversion.json`, `conversion-first.json` and `conversion-control.json`"
_CONTROL = """\
**What this does not say.** The dense model is half trained, so that its students pass it when they
are trained from scratch: no figure here speaks of a model that was trained to its end. And there is
no control: a student keeps some of the dense network's neurons and is trained, and what of its
quality is the rows' is not told apart from that. One run of each, and no error: differences of a
few thousandths of a nat mean nothing. `python -m benchmarks.dense control` makes students of a real
model with rows and without, and `edge-memllm layers` says which of its layers are tables."""


def plot(results: Results) -> str:
    """Perplexity against million tokens of training."""
    lines = [*_student_lines(results), *_scratch_lines(results)]
    dense = math.exp(results["dense"]["loss"])
    every = [point for _, points in lines for point in points]
    x = spanning([point[0] for point in every], _LEFT, _RIGHT)
    y = spanning([dense, *(point[1] for point in every)], _BOTTOM, _TOP, logarithmic=True)
    title = "Held-out perplexity by training"
    parts = frame(title, (x, y), ("million tokens of training", "perplexity"))
    level = y.place(dense)
    parts.append(path([(_LEFT, level), (_RIGHT, level)], "front"))
    parts.append(text(_LEFT + 8, level + 15, "the dense model", "name"))
    ends = []
    for colour, (name, points) in enumerate(lines):
        places = [(x.place(tokens), y.place(value)) for tokens, value in points]
        scratch = colour >= len(results["students"])
        # From scratch the line is the training's loss, and only its end is held-out text.
        parts.append(path(places[:-1] if scratch else places, "line", colour))
        parts.extend(dot(*at, colour) for at in (places[-1:] if scratch else places))
        ends.append((places[-1][1], name, colour))
    parts.extend(at_right(ends, _RIGHT + 8, _TOP, _BOTTOM))
    return picture(_WIDTH, _HEIGHT, title, parts, alone=True)


def page(results: Results, first: Results | None = None, control: Results | None = None) -> str:
    """The whole page as Markdown.

    ``first`` is what one layer of a real model costs as a table, ``control`` what rows in all of
    its layers do against none.
    """
    return "\n".join(
        [
            "# Conversion: when it pays, and how much of a dense model comes back",
            "",
            f"Made by `python -m benchmarks.conversion page` of {_SOURCES}; edit none of them.",
            "",
            *_when(first, control),
            "## A small model of our own, all layers at once",
            "",
            _introduction(results),
            "",
            _CONTROL,
            "",
            "![perplexity by tokens](../images/conversion.svg)",
            "",
            *_table(results),
            "",
            *_reading(results),
            "",
            *(line for each in results["students"] for line in _curve(each, results)),
            "## What was run",
            "",
            *_settings(results),
        ]
    )


def _when(first: Results | None, control: Results | None) -> list[str]:
    """When converting pays, as far as it was measured on a real model."""
    lines = []
    if first is not None:
        lines += [f"**One layer.** {first_verdict(first)} {_against_neurons(first)}", ""]
    if control is not None:
        lines += [f"**All layers.** {_all_layers(control)}", ""]
    if first is not None and control is not None:
        lines += [f"**So**: {_pays(first, control)}", ""]
    return ["## When does converting pay?", "", *lines] if lines else []


def _against_neurons(first: Results) -> str:
    """The control of the table: as much of the layer as is computed still, without rows."""
    kept = first["replacements"][f"{first['size']['narrow']} neurons"]["difference"]
    return (
        f"The control: {first['size']['narrow']} neurons of that layer without rows lose "
        f"{gap_words(kept)} nats. [The page](conversion-first.md)."
    )


def _all_layers(control: Results) -> str:
    found = control["distilled"]
    gap = found["rows against control"]["difference"]
    told = "no difference that can be told" if not is_beyond(gap) else "better than none"
    told = "worse than none" if is_beyond(gap) and gap["mean"] > 0 else told
    return (
        f"With rows in all layers and {control['model']['width']} of "
        f"{control['model']['neurons']} neurons left, distilled on {control['tokens']:,} tokens, "
        f"the student is {gap_words(found['rows']['difference'])} nats above the dense model; rows "
        f"are {told} ({gap_words(gap)}). [The control](conversion-control.md)."
    )


def _pays(first: Results, control: Results) -> str:
    lost = first["replacements"]["table"]["difference"]
    rows = control["distilled"]["rows against control"]["difference"]
    one = (
        "a layer that [is a table](layers.md) can go to storage at a loss that cannot be told from "
        f"none, but one layer is little: {won_words(first)}"
        if lost["low"] <= 0
        else f"even the layer that is a table loses {gap_words(lost)} nats there"
    )
    every = (
        "in all layers at once it did not pay at the budget that was measured"
        if rows["high"] >= 0
        else "in all layers at once rows were better than none, and the dense model was better yet"
    )
    return f"{one}; {every}. It would pay for a model with many layers that are tables."


def _introduction(results: Results) -> str:
    dense = results["dense"]
    fitted = " or ".join(sorted({f"{each['fit_tokens']:,}" for each in results["students"]}))
    return (
        f"The dense model has {dense['parameters']:,} parameters, learned from "
        f"{dense['tokens_seen'] / 1e6:.1f} million tokens and has a perplexity of "
        f"**{math.exp(dense['loss']):.1f}** on held-out text ({results['windows']} windows of "
        f"{results['length']} tokens, spread evenly over it; the same for all figures). A student "
        "has the shape of the network trained from scratch that it is compared with. Before its "
        f"first step it is fitted to {fitted} tokens of the training text. The lines from scratch "
        "are one long training's losses on the way, not the ends of shorter ones, and it learned "
        "from the same text as the dense model."
    )


def _student_lines(results: Results) -> list[tuple[str, list[tuple[float, float]]]]:
    return [
        (f"{each['name']} converted", [(t / 1e6, math.exp(loss)) for t, loss in each["points"]])
        for each in results["students"]
    ]


def _scratch_lines(results: Results) -> list[tuple[str, list[tuple[float, float]]]]:
    """Training losses, and at the end the held-out one."""
    lines = []
    for each in results["scratch"]:
        points = [(t / 1e6, math.exp(loss)) for t, loss in each["history"] if t / 1e6 > _WARM_UP]
        points.append((each["tokens_seen"] / 1e6, math.exp(each["loss"])))
        lines.append((f"{each['name']} from scratch", points))
    return lines


def _table(results: Results) -> list[str]:
    dense = results["dense"]["loss"]
    rows = [
        "| network | parameters | million tokens | perplexity | nats above the dense model |",
        "|---|---|---|---|---|",
    ]

    def row(name: str, each: Results, tokens: float, loss: float) -> str:
        figures = f"{tokens / 1e6:.2f} | {math.exp(loss):.1f} | {loss - dense:+.3f}"
        return f"| {name} | {each['parameters']:,} | {figures} |"

    rows.append(row("dense", results["dense"], results["dense"]["tokens_seen"], dense))
    for each in results["students"]:
        (_, fitted), last = each["points"][0], each["points"][-1]
        rows.append(row(f"{each['name']}, fitted only", each, 0, fitted))
        if last[0]:
            rows.append(row(f"{each['name']}, distilled", each, *last))
    rows.extend(
        row(f"{each['name']}, from scratch", each, each["tokens_seen"], each["loss"])
        for each in results["scratch"]
    )
    return rows


def _reading(results: Results) -> list[str]:
    """What the figures say, in a line for each student."""
    lines = []
    for student, scratch in zip(results["students"], results["scratch"], strict=True):
        (_, fitted), (tokens, last) = student["points"][0], student["points"][-1]
        lines.append(
            f"- {student['name']}: fitted it is where training from scratch is after "
            f"{_reached(scratch, fitted)}"
            + (
                f", after {tokens / 1e6:.2f} million tokens of distillation where that is after "
                f"{_reached(scratch, last)}."
                if tokens
                else "."
            )
        )
    dense = results["dense"]["loss"]
    better = [each["name"] for each in results["scratch"] if each["loss"] < dense]
    if better:
        lines.append(
            f"- From scratch, {' and '.join(better)} end **better than the dense model**, which "
            "these few tokens leave half trained: that is the best a student can imitate. "
            "`conversion.label_weight` adds the next-token loss for such cases."
        )
    return lines


def _reached(scratch: Results, loss: float) -> str:
    """When a training from scratch first had such a loss on the text it was learning."""
    for tokens, found in scratch["history"]:
        if found <= loss:
            return f"about {tokens / 1e6:.1f} million tokens"
    return f"more than {scratch['tokens_seen'] / 1e6:.1f} million tokens"


def _curve(student: Results, results: Results) -> list[str]:
    """Every checkpoint of one student."""
    dense = results["dense"]["loss"]
    lines = [
        f"### {student['name']}, checkpoint by checkpoint",
        "",
        "| million tokens | perplexity | nats above the dense model |",
        "|---|---|---|",
    ]
    for tokens, loss in student["points"]:
        lines.append(f"| {tokens / 1e6:.2f} | {math.exp(loss):.1f} | {loss - dense:+.3f} |")
    return [*lines, ""]


def _settings(results: Results) -> list[str]:
    lines: list[str] = []
    for each in results["students"]:
        settings = each["settings"]
        steps, beta = settings["training"]["steps"], settings["model"].get("beta", 3)
        command = f"edge-memllm convert DENSE OUT --data TRAIN --steps {steps} --beta {beta}"
        lines += ["```", " \\\n  ".join([command, *_overrides(settings)]), "```", ""]
    return lines


def _toml(value: Any) -> str:
    """A value as the shell hands it to --set."""
    return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def _overrides(settings: Results) -> Sequence[str]:
    kept = {
        "data": ("document_start", "sequence_length", "boundary_first"),
        "training": (
            *("batch_size", "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay"),
            "seed",
        ),
        "conversion": tuple(settings["conversion"]),
    }
    # What was stored before there was a choice.
    settings = {**settings, "data": {"boundary_first": False, **settings["data"]}}
    return [
        f"--set {section}.{key}={_toml(settings[section][key])}"
        for section, keys in kept.items()
        for key in keys
    ]
