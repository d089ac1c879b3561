"""Where in a memory words are promoted: the tokens, rows, or keys of rows, that raise them most.

One pass over the vocabulary in bounded memory. Knows a memory and the words' directions; nothing
of what is then done about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_memllm.interpretation.extremes import Highest
from edge_memllm.interpretation.features import Block, features_of
from edge_memllm.interpretation.memory import Memory
from edge_memllm.interpretation.word_directions import WordDirections

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
By = Literal["tokens", "rows", "keys"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Promoters:
    """What promotes most: rows of `tokens` [n] in `layers` [n], or the `keys` [n] of these."""

    tokens: Ids
    layers: Ids
    keys: Ids | None

    def __len__(self) -> int:
        return len(self.tokens)


def token_readings(
    memory: Memory,
    directions: WordDirections,
    gain: Floats,
    layers: Sequence[int],
    progress: Progress = lambda *_: None,
) -> Floats:
    """Return [V, W]: what each token's memory, all of `layers` together, adds to the words' logits.

    `gain` [M] is that of each memory.
    """
    total = np.zeros((memory.vocabulary, len(directions.directions)), np.float32)
    blocks = features_of(memory, "rows").blocks(
        layers, lambda done, total: progress("memory", done, total)
    )
    for block in blocks:
        total[block.ids] += directions.read(block.vectors) * gain[block.layer]
    return total


def strongest_promoters(
    memory: Memory,
    directions: WordDirections,
    gain: Floats,
    *,
    keys: bool,
    layers: Sequence[int],
    most: int,
    weights: Floats | None = None,
    progress: Progress = lambda *_: None,
) -> Promoters:
    """Return at most `most` rows, or `keys` of rows, that promote most, the strongest first.

    What counts is the sum, over the words, of what each adds to their logits where that is above
    zero. `gain` [M] is that of each memory; `weights` [V] says how much each token counts, None all
    the same. Raises `RequestError` for keys of a memory that has none.
    """
    features = features_of(memory, "coefficients" if keys else "rows")
    parts = features.size if keys else 1
    highest = Highest(most, 1)
    blocks = features.blocks(layers, lambda done, total: progress("memory", done, total))
    for block in blocks:
        promotion = _of_keys if keys else _of_rows
        found = promotion(memory, block, directions, float(gain[block.layer]))  # [N, parts]
        if weights is not None:
            found *= weights[block.ids][:, None]
        # Token, layer and key as one number.
        numbers = (block.ids[:, None] * memory.layers + block.layer) * parts + np.arange(parts)
        highest.add(numbers.ravel(), found.reshape(-1, 1))
    kept = highest.values[:, 0] > 0
    rows, key = np.divmod(highest.ids[kept, 0], parts)
    tokens, layer = np.divmod(rows, memory.layers)
    return Promoters(tokens, layer, key if keys else None)


def memory_gain(gain: Floats, memories: int) -> Floats:
    """Return the gain [M] of each memory out of that of each layer [L].

    A memory that all layers share is added once for each of them, so its gains sum up.
    """
    total: Floats = gain if memories == len(gain) else gain.sum(keepdims=True)
    return total


def _of_rows(memory: Memory, block: Block, directions: WordDirections, gain: float) -> Floats:
    found: Floats = np.maximum(directions.read(block.vectors) * gain, 0).sum(axis=1, keepdims=True)
    return found


def _of_keys(memory: Memory, block: Block, directions: WordDirections, gain: float) -> Floats:
    """What each key's part of each row promotes, [N, K]: word by word, to stay small."""
    values = directions.read(memory.values(block.layer)) * gain  # [K, W]
    total = np.zeros_like(block.vectors)
    for value in values.T:
        total += np.maximum(block.vectors * value, 0)
    return total
