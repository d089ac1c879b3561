"""How far a model's predictions are from those of its float weights, window by window.

Knows contenders only as functions from a window's tokens to logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real.reference import WINDOW, Reference, windows

# From a window [T] to logits [T - 1, V] of the tokens behind its first.
Scores = Callable[[Sequence[int]], NDArray[np.float32]]


@dataclass(frozen=True)
class Judged:
    """A model on a text, against the float weights."""

    perplexity: float
    reference: float  # perplexity of the float weights
    kl: float  # mean divergence of a token, nats
    agreement: float  # share of the tokens for which both hold the same for the likeliest
    tokens: int

    @property
    def increase(self) -> float:
        """Relative change of perplexity."""
        return self.perplexity / self.reference - 1


def judged(scores: Scores, truth: Scores, cut: Sequence[Sequence[int]]) -> Judged:
    """Return what a model is worth on windows; both are asked each of them once."""
    from edge_memllm.evaluation.perplexity import divergences
    from edge_memllm.sampling import next_token_losses

    kl = agreeing = loss = least = 0.0
    count = 0
    for window in cut:
        wanted, found = truth(window), scores(window)
        kl += float(divergences(wanted, found).sum())
        agreeing += float((wanted.argmax(1) == found.argmax(1)).sum())
        loss += float(next_token_losses(found, window[1:]).sum())
        least += float(next_token_losses(wanted, window[1:]).sum())
        count += len(window) - 1
    return Judged(
        perplexity=math.exp(loss / count),
        reference=math.exp(least / count),
        kl=kl / count,
        agreement=agreeing / count,
        tokens=count,
    )


def judged_artifact(model: Any, reference: Reference, tokens: Sequence[int]) -> Judged:
    """Judge an open artifact on a text's tokens."""
    return judged(artifact_scores(model), reference.log_probabilities, windows(tokens))


def artifact_scores(model: Any) -> Scores:
    """Return what gives an open artifact's logits."""
    from edge_memllm.evaluation.perplexity import predictions

    def scores(window: Sequence[int]) -> NDArray[np.float32]:
        parts = predictions(model.runtime, model.source, window, context=WINDOW, stride=WINDOW)
        return np.concatenate([np.array(logits, np.float32) for logits, _ in parts])

    return scores
