"""How far clusters agree with a labelling that knows nothing of them, against shuffled labels.

Purity: the share of the tokens that have the class most of their cluster has. It rises with the
number of clusters by itself, so it is compared with the same clusters under shuffled labels.
Adjusted mutual information needs no such comparison: 0 is chance, 1 the same partition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_memllm.interpretation.learning import learning

Ids = NDArray[np.int64]

SHUFFLES = 20
_NOTHING = 1e-9  # nats


def contingency(clusters: Ids, classes: Ids) -> Ids:
    """Return how many tokens are in each cluster and class, [clusters, classes]."""
    width = int(classes.max()) + 1
    counts = np.bincount(clusters * width + classes, minlength=(int(clusters.max()) + 1) * width)
    return counts.reshape(-1, width)


def purity(table: Ids) -> float:
    """Return the share of tokens that are of their cluster's largest class."""
    return float(table.max(axis=1).sum() / table.sum())


def mutual_information(table: Ids) -> float:
    """Return the adjusted mutual information, normalised by the mean of both entropies.

    That of Vinh, Epps and Bailey (2010), eq. 10 and 15; two partitions of one part each agree.
    """
    rows, columns, total = table.sum(axis=1), table.sum(axis=0), int(table.sum())
    entropies = [_entropy(rows / total), _entropy(columns / total)]
    found = sum(entropies) - _entropy(table.ravel() / total)
    kept = table[rows > 0][:, columns > 0]
    expected = float(learning("metrics.cluster").expected_mutual_information(kept, total))
    most = sum(entropies) / 2
    if most - expected <= _NOTHING:
        return 1.0 if sum(entropies) <= _NOTHING else 0.0
    return (found - expected) / (most - expected)


def shuffled_tables(clusters: Ids, classes: Ids, seed: int) -> list[Ids]:
    """Return the tables of `SHUFFLES` random orders of the classes."""
    random = np.random.default_rng(seed)
    return [contingency(clusters, random.permutation(classes)) for _ in range(SHUFFLES)]


def distance(value: float, others: list[float], step: float) -> float:
    """Return how many standard deviations `value` lies above the mean of `others`.

    A deviation counts as `step` at least, the smallest difference that there can be.
    """
    spread = max(float(np.std(others, ddof=1)), step)
    return (value - float(np.mean(others))) / spread


def _entropy(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
