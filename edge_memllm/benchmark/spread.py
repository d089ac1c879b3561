"""Medians, their spread and their ratios: what may be said of a few noisy figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)  # per cent


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of medians, and the interval that holds it in 95 % of the resampled runs."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it as people read it: `1.04x (1.01 to 1.07)`."""
        return f"{self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"

    @property
    def verdict(self) -> str:
        """Which side is larger, as far as the interval tells."""
        if self.low > 1:
            return "higher"
        return "lower" if self.high < 1 else "no difference seen"


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Return median(above) / median(below) of figures taken in pairs, with a bootstrap interval.

    Pairs are drawn again with replacement, both sides of a pair together, so that what disturbs
    both (another program, a warmer processor) cancels out. The draws are the same every time.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} and {len(below)} figures, expected pairs.")
    top, bottom = np.asarray(above, float), np.asarray(below, float)
    drawn = np.random.default_rng(0).integers(0, len(top), (_RESAMPLES, len(top)))
    ratios = np.median(top[drawn], axis=1) / np.median(bottom[drawn], axis=1)
    low, high = np.percentile(ratios, _INTERVAL)
    return Ratio(float(np.median(top) / np.median(bottom)), float(low), float(high))


def quartiles(figures: Sequence[float]) -> list[float]:
    """Return the values that a quarter and three quarters of the figures lie below."""
    return [float(each) for each in np.percentile(figures, (25, 75))]
