"""Rounds to lists of values and of ratios. Plain numbers in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gemma.measuring import OURS

# Round: contender -> figure -> value.
Rounds = Sequence[Mapping[str, Mapping[str, Any]]]


FIGURES = {
    "load": "load, s",
    "first_token": "load and first token of 128, s",
    "decode_128": "decode at 128, tokens/s",
    "decode_128_cold": "decode at 128 cold, tokens/s",
    "decode_1024": "decode at 1,024, tokens/s",
    "prefill": "prefill of 512, tokens/s",
    "prefill_cold": "prefill of 512 cold, tokens/s",
    "own_memory": "own memory, MB",
    "mapped_memory": "mapped, MB",
    "peak_memory": "peak, MB",
}


def names(rounds: Rounds) -> list[str]:
    """Contenders of all rounds, in the order of the turns."""
    return [name for name in rounds[-1] if all(name in each for each in rounds)]


def values(rounds: Rounds, name: str, figure: str) -> list[float]:
    """The values of a figure, one of each round that has it."""
    return [each[name][figure] for each in rounds if figure in each.get(name, {})]


def ratios(rounds: Rounds, figure: str, to: str, of: str = OURS) -> list[float]:
    """The ratios of a contender's figure to another's."""
    return [
        each[of][figure] / each[to][figure]
        for each in rounds
        if figure in each.get(of, {}) and figure in each.get(to, {})
    ]
