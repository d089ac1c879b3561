"""Words turned down: changes of memory rows that take away what promotes them, as an overlay.

Three ways, by what is taken away: what a token's memory as a whole adds to a word, in its last
layer; what single rows add; or all that single keys add to a row, whatever else they do. Knows no
files; the overlay's writer has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.interpretation.features import check_layers
from edge_memllm.interpretation.memory import Memory
from edge_memllm.interpretation.promoters import (
    By,
    Progress,
    Promoters,
    memory_gain,
    strongest_promoters,
    token_readings,
)
from edge_memllm.interpretation.word_directions import WordDirections
from edge_memllm.overlays import Edit

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

DEFAULT_MOST = 2000
MOST_STRENGTH = 10
_BLOCK_TOKENS = 1024  # whose coefficients are alive at once


@dataclass(frozen=True, slots=True, eq=False)
class Suppression:
    """Changes [n, D] of the rows of `tokens` [n] in `layers` [n], by token, then layer.

    `before` and `after` [n, W] are what is added to the words' logits, gain included: by each row,
    or by tokens, by all of the token's memory. `parts` counts what was turned down: tokens, rows,
    or keys of rows.
    """

    tokens: Ids
    layers: Ids
    changes: Floats
    before: Floats
    after: Floats
    parts: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def promotion(self) -> tuple[float, float]:
        """What is added to the words' logits where that is above zero: was, and is.

        Summed over the words, mean over the rows; zero where there are none.
        """
        rows = max(1, len(self))
        was, now = (float(np.maximum(each, 0).sum()) / rows for each in (self.before, self.after))
        return was, now

    def edits(self) -> Iterator[Edit]:
        """Yield the changes as an overlay has them: rows to add."""
        for token, layer, change in zip(self.tokens, self.layers, self.changes, strict=True):
            yield Edit(int(token), int(layer), "add", change)


def suppress_words(
    memory: Memory,
    directions: WordDirections,
    gain: Floats,
    *,
    by: By = "tokens",
    strength: float = 1.0,
    most: int = DEFAULT_MOST,
    layers: Sequence[int] | None = None,
    weights: Floats | None = None,
    progress: Progress = lambda *_: None,
) -> Suppression:
    """Find what promotes words most, and return the changes that turn it down.

    `gain` [L] is the model's. `strength` is the share that is taken away: 1 all of it, 0 nothing,
    which changes no row, 2 makes its opposite of it. At most `most` tokens, rows or keys of rows
    are turned down, found in `layers`, None for all; by tokens, what these layers add together is
    taken away in the last of them that counts. `weights` [V] says how much each token counts in
    finding the strongest.

    Raises `RequestError` for values that cannot be, and for keys of a memory that has none.
    """
    layers = tuple(range(memory.layers)) if layers is None else layers
    check_layers(layers, memory.layers)
    _check(strength, most, weights, memory.vocabulary)
    gains = memory_gain(gain, memory.layers)
    most = most if strength else 0
    if by == "tokens":
        total = token_readings(memory, directions, gains, layers, progress)
        place = max((layer for layer in layers if gains[layer]), default=layers[0])
        tokens = _highest(np.maximum(total, 0).sum(axis=1), most, weights)
        return _of_tokens(directions, tokens, total[tokens], (place, gains[place]), strength)
    found = strongest_promoters(
        memory,
        directions,
        gains,
        keys=by == "keys",
        layers=layers,
        most=most,
        weights=weights,
        progress=progress,
    )
    parts = [
        _in_layer(memory, directions, gains[layer], found, layer, strength) for layer in layers
    ]
    return _joined(parts, len(found))


def _check(strength: float, most: int, weights: Floats | None, vocabulary: int) -> None:
    if not 0 <= strength <= MOST_STRENGTH:
        raise RequestError(
            f"strength is {strength:g}, expected 0 (nothing) to {MOST_STRENGTH}; 1 takes all of it."
        )
    if most < 1:
        raise RequestError(f"most is {most}, expected at least 1.")
    if weights is not None and weights.shape != (vocabulary,):
        raise RequestError(f"weights {list(weights.shape)}, expected one for each of {vocabulary}.")


def _highest(scores: Floats, most: int, weights: Floats | None) -> Ids:
    """The tokens, rising, of the `most` highest scores [V] above zero."""
    weighted = scores if weights is None else scores * weights
    order = np.argsort(-weighted, kind="stable")[:most]
    return np.sort(order[weighted[order] > 0])


def _of_tokens(
    directions: WordDirections,
    tokens: Ids,
    before: Floats,
    place: tuple[int, np.float32],
    strength: float,
) -> Suppression:
    """The change of one row of each token: in the layer `place`, for which its gain stands."""
    layer, gain = place
    changes = _taken(directions, before, gain, strength)
    after = before + directions.read(changes) * gain
    return Suppression(tokens, np.full(len(tokens), layer), changes, before, after, len(tokens))


def _in_layer(
    memory: Memory,
    directions: WordDirections,
    gain: np.float32,
    found: Promoters,
    layer: int,
    strength: float,
) -> Suppression:
    """The changes of one layer's rows."""
    inside = found.layers == layer
    ids, places = np.unique(found.tokens[inside], return_inverse=True)
    rows = memory.rows(layer, ids)
    before = directions.read(rows) * gain
    if found.keys is None:
        changes = _taken(directions, before, gain, strength)
    else:
        changes = -strength * _of_keys(memory, layer, ids, places, found.keys[inside])
    after = directions.read(rows + changes) * gain
    return Suppression(ids, np.full(len(ids), layer), changes, before, after, int(inside.sum()))


def _taken(directions: WordDirections, before: Floats, gain: np.float32, strength: float) -> Floats:
    """The changes [n, D] that take a share of what `before` [n, W] has above zero.

    Where the gain is zero nothing is promoted, so that there is nothing to divide.
    """
    share = np.float32(-strength) / (gain or np.float32(1))
    return directions.change(np.maximum(before, 0) * share)


def _of_keys(memory: Memory, layer: int, ids: Ids, places: Ids, keys: Ids) -> Floats:
    """What keys add to rows [N, D]: `keys[i]` to that of `ids[places[i]]`."""
    total = np.zeros((len(ids), memory.width), np.float32)
    named, column = np.unique(keys, return_inverse=True)
    for start in range(0, len(ids), _BLOCK_TOKENS):
        block = ids[start : start + _BLOCK_TOKENS]
        inside = (places >= start) & (places < start + len(block))
        chosen = np.zeros((len(block), len(named)), np.float32)
        chosen[places[inside] - start, column[inside]] = 1
        chosen *= memory.coefficients(layer, block, named.tolist())
        total[start : start + len(block)] = chosen @ memory.values(layer, named.tolist())
    return total


def _joined(parts: Sequence[Suppression], count: int) -> Suppression:
    """All layers' changes, in the order of an overlay."""

    def every(name: str) -> NDArray[np.float32]:
        return np.concatenate([getattr(part, name) for part in parts])

    tokens, layers = (every(name).astype(np.int64) for name in ("tokens", "layers"))
    order = np.lexsort((layers, tokens))
    changes, before, after = (every(name)[order] for name in ("changes", "before", "after"))
    return Suppression(tokens[order], layers[order], changes, before, after, count)
