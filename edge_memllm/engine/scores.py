"""How likely the model held each token of a text, and which it held likeliest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.sampling import Drawn, next_token_losses


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How likely the model held a token, and which it held likeliest.

    In nats, by the model's own distribution: before temperature, penalties, biases, constraints;
    or, where that was asked for, by the one that it was drawn from.
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


def drawn_score(token: int, drawn: Drawn | None, top: int) -> TokenScore:
    """Return the score of a token among those it was drawn from; None: it was the only one."""
    if drawn is None:
        return TokenScore(token, 0.0, ((token, 0.0),) if top else ())
    order = np.lexsort((drawn.ids, -drawn.probabilities))
    ids, logprobs = drawn.ids[order], np.log(drawn.probabilities[order])
    own = float(logprobs[np.flatnonzero(ids == token)[0]])
    return TokenScore(
        token, own, tuple(zip(ids[:top].tolist(), logprobs[:top].tolist(), strict=True))
    )


def _likeliest(
    logits: NDArray[np.float32], normalizer: float, count: int
) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    count = min(count, logits.size)
    ids = np.argpartition(logits, -count)[-count:]
    ordered = ids[np.lexsort((ids, -logits[ids]))].tolist()
    return tuple((token, float(logits[token]) - normalizer) for token in ordered)
