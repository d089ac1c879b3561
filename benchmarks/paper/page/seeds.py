"""Several runs of one model: their mean, and how far runs of any model lie apart by chance.

The noise is pooled over all models with more than one seed: with two seeds each, one model alone
would tell next to nothing about its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ERRORS = 2.0  # standard errors that count as beyond noise


@dataclass(frozen=True)
class Samples:
    """One figure of every seed, by model."""

    by_variant: Mapping[str, Sequence[float]]

    def mean(self, variant: str) -> float:
        """Return the mean over the seeds of a model."""
        return math.fsum(self.by_variant[variant]) / len(self.by_variant[variant])

    def noise(self) -> float | None:
        """Return the standard deviation of one run, None while no model has two seeds."""
        squares, degrees = 0.0, 0
        for variant, values in self.by_variant.items():
            squares += math.fsum((value - self.mean(variant)) ** 2 for value in values)
            degrees += len(values) - 1
        return math.sqrt(squares / degrees) if degrees else None

    def difference(self, variant: str, other: str) -> tuple[float, float | None]:
        """Return how much larger the figure of `variant` is, and the standard error of that."""
        noise, counts = self.noise(), [len(self.by_variant[each]) for each in (variant, other)]
        error = None if noise is None else noise * math.sqrt(sum(1 / count for count in counts))
        return self.mean(variant) - self.mean(other), error

    def is_larger(self, variant: str, other: str) -> str:
        """Return the verdict on whether the figure of `variant` is the larger one, in words."""
        found, error = self.difference(variant, other)
        if error is None:
            return "yes, one seed" if found > 0 else "no, one seed"
        if abs(found) <= _ERRORS * error:
            return "within noise"
        return "yes" if found > 0 else "no"
