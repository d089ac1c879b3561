"""K-means clusters of a vocabulary by its memory, layer by layer, and what they mean.

Each cluster gets a label and its most typical tokens; all of them together are held against
labellings that know nothing of the memory, with shuffled labels and clusters of the embeddings as
controls. docs/explain.md defines every figure. Needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from edge_memllm.arrays import Floats, Ids
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.interpretation.cluster_labels import Labeller
from edge_memllm.interpretation.findings import (
    Agreement,
    Choice,
    Cluster,
    LayerClusters,
    MapPoint,
)
from edge_memllm.interpretation.memory import (
    EMBEDDING,
    Features,
    Memory,
    check_layers,
    features_of,
    sample_tokens,
    unit,
)
from edge_memllm.interpretation.tokens import Labelling, labellings, token_of
from edge_memllm.progress import Counted, Progress
from edge_memllm.text.token_texts import TokenTexts

CANDIDATES = (8, 16, 32, 64)
SAMPLE, JUDGED = 8192, 2000  # tokens that centres are found on, and that a silhouette is taken of
_LEAST_PER_CLUSTER = 4  # distinct vectors
_STARTS, _ROUNDS = 3, 100  # of K-means: the best of so many, each at most so long
SHUFFLES = 20
_NOTHING = 1e-9  # nats
_FEWEST = 100  # points for t-SNE, which has little to go by with fewer
_PERPLEXITY = 30
_COMPONENTS = 50  # that t-SNE is given, as its authors advise for long vectors
_START = 1e-4  # standard deviation of where t-SNE starts, as in scikit-learn
_LEAST = 1e-12
_TYPICAL = 12  # tokens shown of a cluster
_MAP_POINTS = 600


def cluster_layers(
    source: Memory,
    *,
    texts: TokenTexts,
    layers: Sequence[int],
    progress: Progress = lambda *_: None,
    clusters: int | None = None,
    corpus: str | None = None,
    seed: int = 0,
) -> tuple[LayerClusters, ...]:
    """Cluster all tokens by the vectors of `features_of`, in each layer by itself.

    `clusters` None chooses their number layer by layer. With `corpus`, how often tokens are in
    that text is a labelling too. The same seed gives the same clusters. Raises `RequestError` for
    layers that are not there and more clusters than can be, `RuntimeUnavailableError` without
    scikit-learn.
    """
    learning("cluster")  # said before any work
    features = features_of(source)
    check_layers(layers, features.layers)
    partitions = _partitions(features, layers, clusters, seed, progress)
    baselines = {
        count: partition(features, EMBEDDING, count, seed)
        for count in sorted({len(each.centres) for each in partitions})
    }
    found = assign(
        features, [*partitions, *baselines.values()], lambda *at: progress("assign", *at)
    )
    embedded = dict(zip(baselines, found[len(partitions) :], strict=True))
    judges = labellings(texts, None if corpus is None else texts.counts(corpus))
    labeller = Labeller(texts, judges)
    reports = []
    for number, (each, own) in enumerate(zip(partitions, found, strict=False), 1):
        others = embedded[len(each.centres)]
        points, method = _map(features, each, own, texts, seed)
        reports.append(
            LayerClusters(
                layer=each.layer,
                features=features.kind,
                tokens=features.vocabulary,
                rule=rule(each.choices),
                choices=each.choices,
                clusters=_described(own, texts, labeller),
                agreements=tuple(_agreement(own, others, judge, seed) for judge in judges),
                map_method=method,
                points=points,
            )
        )
        progress("describe", number, len(layers))
    return tuple(reports)


def _partitions(
    features: Features,
    layers: Sequence[int],
    clusters: int | None,
    seed: int,
    progress: Progress,
) -> list[Partition]:
    found = []
    progress("cluster", 0, len(layers))
    for number, layer in enumerate(layers, 1):
        found.append(partition(features, layer, clusters, seed))
        progress("cluster", number, len(layers))
    return found


def _described(own: Assignment, texts: TokenTexts, labeller: Labeller) -> tuple[Cluster, ...]:
    found = []
    for number in range(own.count):
        members = own.clusters == number
        tokens = np.flatnonzero(members)
        nearest = tokens[np.argsort(own.distances[tokens], kind="stable")[:_TYPICAL]]
        typical = tuple(token_of(texts, token) for token in nearest.tolist())
        found.append(Cluster(labeller.label(members, typical), len(tokens), typical))
    return tuple(found)


def _agreement(own: Assignment, others: Assignment, judge: Labelling, seed: int) -> Agreement:
    tokens = judge.labelled
    classes = judge.classes[tokens]
    table, other = (contingency(each.clusters[tokens], classes) for each in (own, others))
    shuffled = shuffled_tables(own.clusters[tokens], classes, seed)
    purities = [purity(each) for each in shuffled]
    return Agreement(
        labelling=judge.name,
        classes=len(judge.names),
        purity=purity(table),
        shuffled_purity=float(np.mean(purities)),
        purity_z=distance(purity(table), purities, 1 / len(tokens)),
        mutual_information=mutual_information(table),
        shuffled_mutual_information=float(np.mean([mutual_information(each) for each in shuffled])),
        embedding_purity=purity(other),
        embedding_mutual_information=mutual_information(other),
        tokens=len(tokens),
    )


def _map(
    features: Features, each: Partition, own: Assignment, texts: TokenTexts, seed: int
) -> tuple[tuple[MapPoint, ...], str]:
    """Places in the plane for a sample of the tokens, and how they were found."""
    ids = sample_tokens(features, _MAP_POINTS, seed)
    places, method = plane(each.points(features.vectors(each.layer, ids)), seed)
    points = tuple(
        MapPoint(token_of(texts, token), x, y, int(own.clusters[token]))
        for token, (x, y) in zip(ids.tolist(), places.tolist(), strict=True)
    )
    return points, method


def learning(part: str) -> Any:
    """Return a module of scikit-learn, such as "cluster"; it takes a second to load.

    Raises `RuntimeUnavailableError` where it is not installed.
    """
    try:
        return import_module(f"sklearn.{part}")
    except ModuleNotFoundError as error:
        raise missing_extra("scikit-learn", "explain") from error


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
    features: Features, partitions: Sequence[Partition], progress: Counted
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


def plane(points: Floats, seed: int) -> tuple[NDArray[np.float64], str]:
    """Return a place [N, 2] for each point [N, W], from -1 to 1, and how they were found.

    t-SNE (van der Maaten and Hinton, 2008), started from the principal components; those alone
    for few points. Distances between far points mean little.
    """
    whole = _principal(points)
    places = np.zeros((len(points), 2), np.float32)
    places[:, : whole.shape[1]] = whole[:, :2]
    how = "the first two principal components"
    if len(points) >= _FEWEST:
        start = places * (_START / max(float(places.std()), _LEAST))
        places = (
            learning("manifold")
            .TSNE(2, perplexity=_PERPLEXITY, init=start, random_state=seed)
            .fit_transform(whole)
        )
        how = f"t-SNE with perplexity {_PERPLEXITY}, started from the principal components"
    places -= (places.max(axis=0) + places.min(axis=0)) / 2
    return places.astype(np.float64) / max(float(np.abs(places).max()), _LEAST), how


def _principal(points: Floats) -> Floats:
    """The first principal components [N, <= 50], the largest first."""
    left, sizes, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    components: Floats = (left * sizes)[:, :_COMPONENTS]
    return components
