"""How often each token will come, from how often a text has it.

Tokens that the text lacks will come too: together about as often as those that it has just once
(Good and Turing's estimate).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MOST = 0.5  # times, for a token that the text lacks: less than one that it has


def token_shares(tokens: NDArray[np.int64], vocab_size: int) -> NDArray[np.float64]:
    """Return the share of each token [V] in texts like this one; all are above zero."""
    counts = np.bincount(tokens, minlength=vocab_size).astype(np.float64)
    lacking = counts == 0
    once = max(1, int((counts == 1).sum()))
    counts[lacking] = min(_MOST, once / max(1, int(lacking.sum())))
    return np.asarray(counts / counts.sum())
