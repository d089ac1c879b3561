"""K-means clusters of a vocabulary by its memory, layer by layer, and what they mean.

Each cluster gets a label and its most typical tokens; all of them together are held against
labellings that know nothing of the memory, with shuffled labels and clusters of the embeddings as
controls. docs/explain.md defines every figure. Needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_memllm.interpretation.agreement import (
    contingency,
    distance,
    mutual_information,
    purity,
    shuffled_tables,
)
from edge_memllm.interpretation.cluster_labels import Labeller
from edge_memllm.interpretation.features import (
    EMBEDDING,
    Features,
    check_layers,
    features_of,
    sample_tokens,
)
from edge_memllm.interpretation.findings import Agreement, Cluster, LayerClusters, MapPoint
from edge_memllm.interpretation.learning import learning
from edge_memllm.interpretation.memory import Memory
from edge_memllm.interpretation.partition import Assignment, Partition, assign, partition, rule
from edge_memllm.interpretation.token_classes import Labelling, labellings
from edge_memllm.interpretation.token_map import plane
from edge_memllm.interpretation.token_texts import TokenTexts

Ids = NDArray[np.int64]
Progress = Callable[[str, int, int], None]

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
        typical = tuple(texts.token(token) for token in nearest.tolist())
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
        MapPoint(texts.token(token), x, y, int(own.clusters[token]))
        for token, (x, y) in zip(ids.tolist(), places.tolist(), strict=True)
    )
    return points, method
