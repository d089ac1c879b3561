"""Next-token losses of windows, and what of their differences is more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from benchmarks.dense.texts import Windows

Logits = Callable[[torch.Tensor], torch.Tensor]
_BATCH = 4  # windows at once
_DRAWS = 2000
_LEVEL = 0.95


def window_losses(logits: Logits, windows: Windows) -> torch.Tensor:
    """Mean nats per token of each window [W]; the first token is not predicted."""
    found = []
    with torch.inference_mode():
        for ids in windows.ids.split(_BATCH):
            predicted = logits(ids)[:, :-1].float()
            losses = functional.cross_entropy(
                predicted.transpose(1, 2), ids[:, 1:], reduction="none"
            )
            found.append(losses.mean(dim=1))
    return torch.cat(found)


@dataclass(frozen=True)
class Difference:
    """Nats by which one is above the other, and the interval of 95 % of resampled documents."""

    mean: float
    low: float
    high: float
    documents: int


def difference(
    losses: Sequence[float], others: Sequence[float], document: Sequence[int], seed: int = 0
) -> Difference:
    """``losses`` less ``others``, window by window; whole documents are drawn anew."""
    gap = torch.tensor(losses, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    numbers, index = torch.tensor(document).unique(return_inverse=True)
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, index, gap)
    counts = torch.bincount(index).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(numbers), (_DRAWS, len(numbers)), generator=generator)
    means = (sums[drawn].sum(1) / counts[drawn].sum(1)).sort().values
    cut = math.floor((1 - _LEVEL) / 2 * _DRAWS)
    low, high = float(means[cut]), float(means[-1 - cut])
    return Difference(float(gap.mean()), low, high, len(numbers))
