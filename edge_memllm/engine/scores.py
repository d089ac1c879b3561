"""How likely the model held each token of a text, and which it held likeliest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.sampling import next_token_losses


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How likely the model held a token, and which it held likeliest.

    In nats, by the model's own distribution: before temperature, penalties, biases, constraints.
    """

    token: int
    logprob: float | None  # None for the first token of a prompt, which nothing predicts
    top: tuple[tuple[int, float], ...] = ()  # likeliest first


def token_scores(logits: NDArray[Any], tokens: Sequence[int], top: int) -> Iterator[TokenScore]:
    """Yield the score of each token [T] under logits [T, V], with the `top` likeliest tokens."""
    wide = np.asarray(logits, np.float32)
    losses = next_token_losses(wide, tokens)
    for row, token, loss in zip(wide, tokens, losses.tolist(), strict=True):
        yield TokenScore(token, -loss, _likeliest(row, float(row[token]) + loss, top))


def _likeliest(
    logits: NDArray[np.float32], normalizer: float, count: int
) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    count = min(count, logits.size)
    ids = np.argpartition(logits, -count)[-count:]
    ordered = ids[np.lexsort((ids, -logits[ids]))].tolist()
    return tuple((token, float(logits[token]) - normalizer) for token in ordered)
