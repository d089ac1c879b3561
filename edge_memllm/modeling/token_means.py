"""The best row for each token out of what was seen at its occurrences, few or many.

The mean of few occurrences is mostly chance, so it is drawn towards a prior: the more occurrences,
the less. How strongly, and towards which prior, is chosen by leaving out one occurrence at a time
and foretelling it from the others, in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Occurrences that the prior counts as.
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass(frozen=True)
class Occurrences:
    """Sums over the occurrences of each token, which is all that is needed of them.

    ``sums`` [U, D] of the values, ``squares`` [U] of their squared lengths, ``counts`` [U].
    """

    sums: torch.Tensor
    squares: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def none(cls, tokens: int, width: int, like: torch.Tensor) -> Occurrences:
        """Before anything was seen; on the device of ``like``."""
        empty = like.new_zeros(tokens, dtype=torch.float64)
        return cls(like.new_zeros(tokens, width), empty, empty.clone())

    def add(self, index: torch.Tensor, values: torch.Tensor) -> None:
        """Count ``values`` [N, D] of the tokens numbered ``index`` [N]."""
        values = values.float()
        self.sums.index_add_(0, index, values)
        self.squares.index_add_(0, index, values.square().sum(dim=1).double())
        self.counts.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))

    def mean(self) -> torch.Tensor:
        """Of all occurrences, whatever their token: [D]."""
        return (self.sums.sum(dim=0, dtype=torch.float64) / self.counts.sum()).to(self.sums.dtype)


@dataclass(frozen=True)
class TokenMeans:
    """``rows`` [U, D], the number of the prior that they are drawn to, and how many it counts as.

    ``error`` is the squared error by which an occurrence is foretold from the others, in all.
    """

    rows: torch.Tensor
    prior: int
    strength: float
    error: float


def token_means(seen: Occurrences, priors: Sequence[torch.Tensor]) -> TokenMeans:
    """Rows of all tokens; those without an occurrence get the prior's.

    ``priors`` are [D], one for all tokens, or [U, D]; the best one and the best of ``STRENGTHS``
    are taken.
    """
    best: tuple[float, int, float] | None = None
    for number, prior in enumerate(priors):
        about = _about(seen, prior)
        for strength in STRENGTHS:
            error = float(leave_one_out(about, strength))
            if best is None or error < best[0]:
                best = error, number, strength
    if best is None:
        raise ValueError("no prior is given, expected at least one.")
    error, number, strength = best
    about = _about(seen, priors[number])
    drawn = about.sums / (about.counts + strength).unsqueeze(1).to(about.sums.dtype)
    return TokenMeans(priors[number] + drawn, number, strength, error)


def leave_one_out(seen: Occurrences, strength: float) -> torch.Tensor:
    """Squared error [] of foretelling each occurrence from the others of its token and zero.

    Zero counts as ``strength`` occurrences.
    """
    # An occurrence y of the n of a token, whose sum is S, is foretold as (S - y) / (n - 1 + k),
    # and so missed by ((n + k) y - S) / (n - 1 + k); squared and summed over the occurrences:
    whole = seen.counts + strength
    missed = whole.square() * seen.squares
    missed += (seen.counts - 2 * whole) * seen.sums.double().square().sum(dim=1)
    return (missed / (whole - 1).square())[seen.counts > 0].sum()


def _about(seen: Occurrences, prior: torch.Tensor) -> Occurrences:
    """The same occurrences less a prior [D] or [U, D]."""
    counts = seen.counts.unsqueeze(1).to(seen.sums.dtype)
    squares = seen.squares - 2 * (seen.sums.double() * prior).sum(dim=1)
    squares += seen.counts * prior.double().square().sum(dim=-1)
    return Occurrences(seen.sums - counts * prior, squares, seen.counts)
