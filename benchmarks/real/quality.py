"""How far models' predictions are from those of their float weights, window by window.

Knows contenders only as functions from a window's tokens to logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real.reference import WINDOW

# From a window [T] to logits [T - 1, V] of the tokens behind its first.
Scores = Callable[[Sequence[int]], NDArray[np.float32]]


@dataclass
class Judged:
    """Sums over the tokens of a text: a model against the float weights."""

    tokens: int = 0
    loss: float = 0.0  # nats
    reference_loss: float = 0.0  # nats, of the float weights
    divergence: float = 0.0  # nats
    agreeing: int = 0  # tokens for which both hold the same for the likeliest

    @property
    def perplexity(self) -> float:
        """The model's."""
        return math.exp(self.loss / self.tokens)

    @property
    def reference(self) -> float:
        """The perplexity of the float weights."""
        return math.exp(self.reference_loss / self.tokens)

    @property
    def increase(self) -> float:
        """Relative change of perplexity."""
        return self.perplexity / self.reference - 1

    @property
    def kl(self) -> float:
        """Mean divergence of a token, nats."""
        return self.divergence / self.tokens

    def as_dict(self) -> dict[str, float]:
        """Return the figures for JSON."""
        return {
            "perplexity": self.perplexity,
            "increase": self.increase,
            "kl": self.kl,
            "agreement": self.agreeing / self.tokens,
        }


def judged(
    contenders: Mapping[str, Scores], truth: Scores, cut: Sequence[Sequence[int]]
) -> dict[str, Judged]:
    """Return what models are worth on windows; the float weights see each window once."""
    from edge_memllm.evaluation.perplexity import divergences
    from edge_memllm.sampling import next_token_losses

    sums = {name: Judged() for name in contenders}
    for window in cut:
        wanted, targets = truth(window), window[1:]
        least = float(next_token_losses(wanted, targets).sum())
        for name, scores in contenders.items():
            found, each = scores(window), sums[name]
            each.tokens += len(targets)
            each.loss += float(next_token_losses(found, targets).sum())
            each.reference_loss += least
            each.divergence += float(divergences(wanted, found).sum())
            each.agreeing += int((wanted.argmax(1) == found.argmax(1)).sum())
    return sums


def artifact_scores(model: Any) -> Scores:
    """Return what gives an open artifact's logits."""
    from edge_memllm.evaluation.perplexity import predictions

    def scores(window: Sequence[int]) -> NDArray[np.float32]:
        parts = predictions(model.runtime, model.source, window, context=WINDOW, stride=WINDOW)
        return np.concatenate([np.array(logits, np.float32) for logits, _ in parts])

    return scores
