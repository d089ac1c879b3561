"""What is asked of E2B, against what was found. The bars are those the work was begun with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.gemma.figures import Rounds, ratios, values
from benchmarks.gemma.measuring import IN_MEMORY, LAZY, LIMITS, LLAMA, OURS, TWO_BITS
from benchmarks.gemma.store import EXPORTS, LIMITED, ROUNDS


@dataclass(frozen=True)
class Bar:
    """At least, or at most, so much of something; in the rows of a table."""

    words: str
    bar: float
    found: float
    unit: str
    at_most: bool = False

    def row(self) -> list[str]:
        """Words, what was asked, what was found, whether it is met."""
        met = self.found <= self.bar if self.at_most else self.found >= self.bar
        asked = f"{'at most' if self.at_most else 'at least'} {self.bar:g}{self.unit}"
        return [self.words, asked, f"{self.found:.3g}{self.unit}", "met" if met else "not met"]


def bars(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table, of the bars that something was measured for."""
    return [
        each.row()
        for each in (
            *_of_rounds(found.get(ROUNDS, ())),
            *_of_limits(found.get(LIMITED, ())),
            *_of_exports(found.get(EXPORTS, {})),
        )
    ]


def _of_rounds(rounds: Rounds) -> Iterator[Bar]:
    for name, most in ((OURS, 1.4), (TWO_BITS, 1.0)):
        if own := values(rounds, name, "own_memory"):
            yield Bar(f"{name}: own memory", most, median(own) / 1e3, " GB", at_most=True)
    asked = (
        ("decode at 128, to llama.cpp's table in memory", 1.0, ("decode_128", LLAMA)),
        ("decode at 1,024, to llama.cpp's table in memory", 1.0, ("decode_1024", LLAMA)),
        ("decode at 128, to llama.cpp lazy", 1.2, ("decode_128", LAZY)),
        ("decode at 128 cold, to llama.cpp lazy cold", 1.2, ("decode_128_cold", LAZY)),
        ("prefill, to llama.cpp's table in memory", 2.0, ("prefill", LLAMA)),
        ("prefill cold, to llama.cpp lazy cold", 2.0, ("prefill_cold", LAZY)),
        ("decode cold, to our table in memory", 0.98, ("decode_128_cold", IN_MEMORY)),
        ("prefill cold, to our table in memory", 0.95, ("prefill_cold", IN_MEMORY)),
    )
    for words, least, pair in asked:
        if these := ratios(rounds, *pair):
            yield Bar(words, least, median(these), "")


def _of_limits(limited: Sequence[Mapping[str, Any]]) -> Iterator[Bar]:
    ours = {each["limit"]: each for each in limited if each["contender"] == OURS}
    free, held = ours.get(None, {}), ours.get(LIMITS[0], {})
    for figure, words in (("decode_128", "decode"), ("prefill", "prefill")):
        if figure in free:
            share = held.get(figure, 0.0) / free[figure]
            yield Bar(f"{words} in a group of 2 GB, to none", 0.95, share, "")


def _of_exports(exports: Mapping[str, Any]) -> Iterator[Bar]:
    if each := exports.get("int4"):
        yield Bar("export from bfloat16", 10, each["seconds"] / 60, " minutes", at_most=True)
        memory = each["peak_anonymous_bytes"] / 1e9
        yield Bar("export, peak of own memory", 3, memory, " GB", at_most=True)
