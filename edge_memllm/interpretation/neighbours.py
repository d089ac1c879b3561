"""How tightly tokens hang together: the clustering coefficient of their nearest-neighbour graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

NEIGHBOURS = 10


def clustering_coefficient(points: Floats, neighbours: int = NEIGHBOURS) -> float:
    """Return the mean local clustering coefficient of points [N, W] of length one.

    Two points are linked if either is among the `neighbours` with the highest cosine to the other.
    A point's coefficient is the share of the pairs of its links that are linked themselves (Watts
    and Strogatz, 1998). Needs N^2 numbers; with so few points that all are linked it is 1.
    """
    linked = _linked(points, min(neighbours, len(points) - 1))
    degree = linked.sum(axis=1)
    closed = ((linked @ linked) * linked).sum(axis=1)  # each triangle twice, as are the pairs below
    pairs = degree * (degree - 1)
    return float(np.divide(closed, pairs, out=np.zeros_like(closed), where=pairs > 0).mean())


def scrambled(vectors: Floats, seed: int) -> Floats:
    """Return vectors [N, W] with each of their W numbers dealt out anew among the N tokens.

    The control: what one number is over all tokens stays, what tokens have in common is gone.
    """
    return np.random.default_rng(seed).permuted(vectors, axis=0)


def _linked(points: Floats, neighbours: int) -> Floats:
    """The graph as a symmetric matrix [N, N] of zeros and ones."""
    cosines = points @ points.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argpartition(-cosines, neighbours - 1, axis=1)[:, :neighbours]
    linked = np.zeros_like(cosines)
    np.put_along_axis(linked, nearest, 1, axis=1)
    return np.maximum(linked, linked.T)
