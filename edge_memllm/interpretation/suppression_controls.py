"""What a suppression is compared with: changes as many and as long, but not where or as chosen.

Knows arrays; nothing of models.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_memllm.interpretation.suppression import Suppression


def other_rows(chosen: Suppression, vocabulary: int, seed: int) -> Suppression:
    """Return the same changes of as many rows in each layer, of tokens drawn from the others.

    In a layer where most tokens were chosen, they are drawn from all. Readings are not those of
    the rows drawn: only the changes are meant to be used.
    """
    random = np.random.default_rng(seed)
    tokens = chosen.tokens.copy()
    for layer in np.unique(chosen.layers):
        inside = chosen.layers == layer
        others = np.setdiff1d(np.arange(vocabulary), chosen.tokens[inside])
        pool = others if len(others) >= inside.sum() else np.arange(vocabulary)
        tokens[inside] = random.choice(pool, inside.sum(), replace=False)
    return replace(chosen, tokens=tokens)


def other_directions(chosen: Suppression, seed: int) -> Suppression:
    """Return changes of the same rows, as long as the chosen ones, in random directions."""
    random = np.random.default_rng(seed)
    drawn = random.standard_normal(chosen.changes.shape, np.float32)
    wanted, found = (
        np.linalg.norm(each, axis=1, keepdims=True) for each in (chosen.changes, drawn)
    )
    return replace(chosen, changes=drawn * (wanted / found))
