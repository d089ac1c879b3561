"""The same models trained for longer: whether orderings are those of an early stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.paper.page.gaps import gap_chart, gap_words, gaps_to_base
from benchmarks.paper.page.layout import (
    FAMILY,
    MISSING,
    VARIANTS,
    Claim,
    Entries,
    Section,
    image,
    table,
)
from benchmarks.paper.page.quality import training_command

_KIND = "-long"
_TITLE = "Trained for longer"
_INTRODUCTION = """\
The same models, data and settings with more steps, over which the learning rate falls. The noise
of one run is that of the shorter trainings."""
_BASE_LEADS = "Base better than MemoryLLM at equal total parameters, trained for longer"


def longer_section(entries: Entries) -> Section:
    """Return the section from the entries of the measurement `perplexity`."""
    runs = {name: entries[f"{name}{_KIND}-s1"] for name in FAMILY if f"{name}{_KIND}-s1" in entries}
    if not runs:
        return Section(_TITLE, f"{MISSING}.", (Claim(_BASE_LEADS, MISSING, "-"),))
    parts, pictures = [_INTRODUCTION, _runs_table(runs, entries)], {}
    if gaps := gaps_to_base(entries, _KIND):
        pictures["paper-longer.svg"] = gap_chart(gaps)
        parts.append(image("paper-longer.svg", "Training loss less that of Base, by tokens."))
        parts.append(gap_words(gaps))
    return Section(_TITLE, "\n\n".join(parts), tuple(_claims(runs)), pictures, "perplexity")


def _runs_table(runs: Entries, entries: Entries) -> str:
    head = ["model", "million tokens", "perplexity", "of the shorter training", "command"]
    rows = []
    for variant, run in runs.items():
        short = entries.get(f"{variant}-s1")
        rows.append(
            [
                VARIANTS[variant],
                f"{run['figures']['tokens_seen'] / 1e6:.1f}",
                f"{_perplexity(run):.2f}",
                MISSING if short is None else f"{_perplexity(short):.2f}",
                f"`{_command(variant, run)}`",
            ]
        )
    return table(head, rows)


def _command(variant: str, run: Mapping[str, Any]) -> str:
    settings = run["figures"]["training"]["settings"]
    words = training_command(variant, 1, f"{variant}{_KIND}")
    return " ".join([words, *(f"--set training.{name}={settings[name]}" for name in settings)])


def _claims(runs: Entries) -> Iterator[Claim]:
    if not {"base", "memoryllm"} <= runs.keys():
        yield Claim(_BASE_LEADS, MISSING, "-")
        return
    found = math.log(_perplexity(runs["memoryllm"]) / _perplexity(runs["base"]))
    words = f"MemoryLLM {math.expm1(found):+.1%} in perplexity ({found:+.4f} nats)"
    yield Claim(_BASE_LEADS, words, f"{'yes' if found > 0 else 'no'}, one seed")


def _perplexity(run: Mapping[str, Any]) -> float:
    found: float = run["figures"]["texts"]["together"]["perplexity"]
    return found
