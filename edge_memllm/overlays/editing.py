"""Edits as people name them: these tokens, in these layers, less, gone, or like another token.

Knows where rows come from and token ids; words become ids before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edge_memllm.errors import RequestError
from edge_memllm.overlays.overlay import LARGEST_FACTOR, Edit
from edge_memllm.record_source import RecordSource


@dataclass(frozen=True, slots=True)
class Alteration:
    """What is to become of the rows of some tokens; exactly one of the three ways.

    `strength` is how far rows go towards those of the token `like`: 1 all the way. `layers` None
    means all. Raises `RequestError` for no way or several, and a strength without `like`.
    """

    tokens: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    scale: float | None = None
    blank: bool = False
    like: int | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        ways = {"scale": self.scale is not None, "blank": self.blank, "like": self.like is not None}
        chosen = [name for name, given in ways.items() if given]
        if len(chosen) != 1:
            found = " and ".join(chosen) or "none of them"
            raise RequestError(f"{found} given, expected one of {', '.join(ways)}.")
        if self.strength is not None and self.like is None:
            raise RequestError(f"strength is given with {chosen[0]}; it goes with like.")
        if self.strength is not None and not abs(self.strength) <= LARGEST_FACTOR:  # or NaN
            raise RequestError(
                f"strength is {self.strength}, expected a number of at most {LARGEST_FACTOR:g}."
            )


def edits_of(alterations: Iterable[Alteration], table: RecordSource) -> list[Edit]:
    """Return the edits that alterations mean for the rows of a table.

    Raises `RequestError` for tokens or layers that are not there.
    """
    return [edit for each in alterations for edit in _edits(each, table)]


def checked_layers(layers: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """Return the layers, None replaced by all. Raises `RequestError` for one that is not there."""
    wrong = [layer for layer in layers or () if not 0 <= layer < count]
    if wrong:
        raise RequestError(f"Layer {wrong[0]}: the model has memory rows 0 to {count - 1}.")
    return tuple(range(count)) if layers is None else tuple(sorted(set(layers)))


def _edits(wanted: Alteration, table: RecordSource) -> list[Edit]:
    tokens = sorted(set(wanted.tokens))
    layers = checked_layers(wanted.layers, table.layout.layers)
    pairs = [(token, layer) for token in tokens for layer in layers]
    if wanted.blank:
        return [Edit(*pair, "blank") for pair in pairs]
    if wanted.scale is not None:
        return [Edit(*pair, "scale", factor=wanted.scale) for pair in pairs]
    assert wanted.like is not None
    rows = table.rows(np.array(tokens))
    goal = table.rows(np.array([wanted.like]))[0]
    strength = np.float32(1 if wanted.strength is None else wanted.strength)
    moved = np.broadcast_to(goal, rows.shape) if strength == 1 else rows + strength * (goal - rows)
    return [
        Edit(token, layer, "replace", moved[tokens.index(token), layer]) for token, layer in pairs
    ]
