"""K-means of a layer's vectors: how many clusters, where their centres are, and whose they are.

Vectors less the vocabulary's mean, at length one, so that near means a high cosine. Centres are
found on a sample of tokens; every token then goes to its nearest centre as the vocabulary streams
by. Needs scikit-learn; knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from edge_memllm.errors import RequestError
from edge_memllm.interpretation.features import Features, sample_tokens, unit
from edge_memllm.interpretation.findings import Choice
from edge_memllm.interpretation.learning import learning

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

CANDIDATES = (8, 16, 32, 64)
SAMPLE, JUDGED = 8192, 2000  # tokens that centres are found on, and that a silhouette is taken of
_LEAST_PER_CLUSTER = 4  # distinct vectors
_STARTS, _ROUNDS = 3, 100  # of K-means: the best of so many, each at most so long


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Centres [k, W] of a layer's vectors, which are taken less `mean` [W] and at length one."""

    layer: int
    mean: Floats
    centres: Floats
    choices: tuple[Choice, ...]  # that were tried, with their silhouettes; none if k was asked for

    def points(self, vectors: Floats) -> Floats:
        """Return vectors [N, W] as they are compared with centres."""
        return unit(vectors - self.mean)

    def assign(self, vectors: Floats) -> tuple[Ids, Floats]:
        """Return the nearest centre of each vector [N], and the squared distance to it."""
        points = self.points(vectors)
        squares = (self.centres**2).sum(axis=1)
        far = squares - 2 * (points @ self.centres.T)  # less the vector's own square
        nearest = far.argmin(axis=1)
        own = (points**2).sum(axis=1)
        return nearest, own + far[np.arange(len(far)), nearest]


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """The cluster of every token [V], the largest cluster first, and its distance from the centre.

    Only clusters that have tokens are there.
    """

    clusters: Ids
    distances: Floats

    @property
    def count(self) -> int:
        """How many clusters there are."""
        return int(self.clusters.max()) + 1


def partition(features: Features, layer: int, clusters: int | None, seed: int) -> Partition:
    """Find centres in one layer; None for `clusters` takes that of `CANDIDATES` which fits best.

    Raises `RequestError` where there are fewer distinct vectors than clusters.
    """
    points, mean = _sample(features, layer, seed)
    distinct = len({xxh3_64_intdigest(row) for row in points})
    _check(clusters, distinct, layer)
    if clusters is not None:
        return Partition(layer, mean, _centres(points, clusters, seed)[0], ())
    best, choices = np.empty((0, 0), np.float32), list[Choice]()
    for count in _candidates(distinct):
        centres, labels = _centres(points, count, seed)
        choices.append(Choice(count, _silhouette(points, labels, seed)))
        if choices[-1].value == max(choice.value for choice in choices):
            best = centres
    return Partition(layer, mean, best, tuple(choices))


def assign(
    features: Features, partitions: Sequence[Partition], progress: Callable[[int, int], None]
) -> list[Assignment]:
    """Return the clusters of all tokens for each of the partitions, in one pass."""
    clusters = np.zeros((len(partitions), features.vocabulary), np.int64)
    distances = np.zeros(clusters.shape, np.float32)
    layers = list(dict.fromkeys(each.layer for each in partitions))
    for block in features.blocks(layers, progress):
        for number, each in enumerate(partitions):
            if each.layer == block.layer:
                found = each.assign(block.vectors)
                clusters[number, block.ids], distances[number, block.ids] = found
    return [Assignment(_by_size(own), far) for own, far in zip(clusters, distances, strict=True)]


def rule(choices: Sequence[Choice]) -> str:
    """Return in words how the number of clusters was chosen."""
    if not choices:
        return "the number that was asked for"
    counts = ", ".join(str(choice.clusters) for choice in choices)
    return f"the highest mean silhouette of {JUDGED:,} tokens at most, among {counts} clusters"


def _sample(features: Features, layer: int, seed: int) -> tuple[Floats, Floats]:
    """Vectors of some tokens as they are compared, and the mean that was taken off."""
    vectors = features.vectors(layer, sample_tokens(features, SAMPLE, seed))
    mean = vectors.mean(axis=0)
    return unit(vectors - mean), mean


def _by_size(clusters: Ids) -> Ids:
    """Number clusters by size, the largest first, leaving out empty ones."""
    sizes = np.bincount(clusters)
    order = np.argsort(-sizes, kind="stable")
    numbers = np.empty_like(order)
    numbers[order] = np.arange(len(order))
    return np.asarray(numbers[clusters])


def _candidates(distinct: int) -> list[int]:
    fitting = [count for count in CANDIDATES if count * _LEAST_PER_CLUSTER <= distinct]
    return fitting or [max(2, distinct // _LEAST_PER_CLUSTER)]


def _check(clusters: int | None, distinct: int, layer: int) -> None:
    least = 2 if clusters is None else clusters
    if least < 2:
        raise RequestError(f"clusters is {clusters}, expected at least 2.")
    if distinct <= least:
        raise RequestError(
            f"layer {layer}: the tokens that are looked at have {distinct} distinct vectors, too "
            f"few for {least} clusters. Ask for fewer."
        )


def _centres(points: Floats, count: int, seed: int) -> tuple[Floats, Ids]:
    means = learning("cluster").KMeans(count, n_init=_STARTS, max_iter=_ROUNDS, random_state=seed)
    labels = means.fit_predict(points)
    return means.cluster_centers_.astype(np.float32), labels.astype(np.int64)


def _silhouette(points: Floats, labels: Ids, seed: int) -> float:
    """The mean over some points of (b - a) / max(a, b) (Rousseeuw, 1987)."""
    judged = np.random.default_rng(seed).permutation(len(points))[:JUDGED]
    if not 2 <= len(np.unique(labels[judged])) < len(judged):
        return -1.0
    return float(learning("metrics").silhouette_score(points[judged], labels[judged]))
