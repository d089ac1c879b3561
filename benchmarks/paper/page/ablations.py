"""Changes to the network that the paper does not measure, each against the model without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.paper.changes import CHANGES, WANTED
from benchmarks.paper.page.layout import MISSING, VARIANTS, Entries, Section, table
from benchmarks.paper.page.quality import losses, training_command

_PREFIX = "abl-"
_PLAIN = {0: "memoryllm", 1: "flex-1", 2: "flex-2", 3: "flex-3"}
_INTRODUCTION = """\
Same data, same order, same number of steps. Noise is that of one run above; a difference between
two single runs is beyond it from two standard errors on."""


def ablations_section(entries: Entries) -> Section:
    """Return the section from the entries of the measurement `perplexity`."""
    title = "Changes to the network"
    runs = [each for each in entries.values() if each["variant"].startswith(_PREFIX)]
    done = {words for run in runs for words in run["model"]["changes"]}
    missing = "; ".join(words for words in WANTED if words not in done)
    left = [f"{MISSING[0].upper()}{MISSING[1:]}: {missing}."] if missing else []
    if not runs:
        return Section(title, left[0])
    head = ["change", "against", "seed", "perplexity", "without it", "difference, nats"]
    head += ["beyond noise", "parameters in the layers", "table rows of a token", "trained with"]
    noise = losses(entries).noise()
    rows = [_row(run, entries, noise) for run in runs]
    text = "\n\n".join([_INTRODUCTION, table(head, rows), *left])
    return Section(title, text, measured="perplexity")


def _row(run: Mapping[str, Any], entries: Entries, noise: float | None) -> list[str]:
    plain = _PLAIN[run["model"]["beta"]]
    words = "; ".join(run["model"]["changes"]) or run["variant"].removeprefix(_PREFIX)
    start = [words, VARIANTS[plain], str(run["seed"]), f"{_text(run)['perplexity']:.2f}"]
    size = [f"{run['model']['total'] / 1e6:.2f} M", str(run["model"]["memory_rows"])]
    size.append(f"`{_command(run, plain)}`")
    other = entries.get(f"{plain}-s{run['seed']}")
    if other is None:
        return [*start, MISSING, "-", "-", *size]
    difference = math.log(_text(run)["perplexity"] / _text(other)["perplexity"])
    return [
        *start,
        f"{_text(other)['perplexity']:.2f}",
        f"{difference:+.4f}",
        _beyond(difference, noise),
        *size,
    ]


def _command(run: Mapping[str, Any], plain: str) -> str:
    """How the run was trained: the model without the changes, and a setting for each of them."""
    command = training_command(plain, run["seed"], run["variant"])
    settings = {words: change for change, words in CHANGES.items()}
    for words in run["model"]["changes"]:
        width = ("memory_intermediate_size", run["model"]["memory_width"])
        field, value = settings.get(words, width)
        command += f" --set model.{field}={value}"
    return command


def _text(run: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = run["figures"]["texts"]["together"]
    return found


def _beyond(difference: float, noise: float | None) -> str:
    if noise is None:
        return "noise not known"
    if abs(difference) <= 2 * math.sqrt(2) * noise:
        return "no"
    return "yes, worse" if difference > 0 else "yes, better"
