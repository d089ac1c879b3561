"""Tokens whose memory is the most alike: by cosine, in each layer and in all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_memllm.interpretation.extremes import Highest
from edge_memllm.interpretation.features import (
    Features,
    check_layers,
    features_of,
    unit,
)
from edge_memllm.interpretation.findings import Scored, SimilarTokens
from edge_memllm.interpretation.memory import Memory
from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.request import check_positive, check_tokens

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

_ITSELF = -2.0  # below every cosine


def similar_tokens(
    source: Memory,
    tokens: Sequence[int],
    *,
    texts: TokenTexts,
    layers: Sequence[int],
    count: int = 10,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[SimilarTokens, ...]:
    """Return the `count` tokens most like each of `tokens`, in each layer and in all of them.

    Alike is a high cosine between the vectors of `features_of`; in all layers (layer None, where
    several were asked for) it is the mean of the layers' cosines. One pass over the vocabulary
    serves all. Raises `RequestError` for tokens and layers that are not there, and no count.
    """
    features = features_of(source)
    check_layers(layers, features.layers)
    check_positive("count", count)
    ids = np.array(list(dict.fromkeys(check_tokens(tokens, features.vocabulary))), np.int64)
    best = _most_similar(features, ids, layers, count, lambda *at: progress("similar", *at))
    return tuple(
        SimilarTokens(
            texts.token(int(token)),
            layer,
            features.kind,
            tuple(
                Scored(texts.token(int(other)), float(cosine))
                for other, cosine in zip(found.ids[:, column], found.values[:, column], strict=True)
                if cosine > _ITSELF
            ),
        )
        for column, token in enumerate(ids)
        for layer, found in best.items()
    )


def _most_similar(
    features: Features,
    ids: Ids,
    layers: Sequence[int],
    count: int,
    progress: Callable[[int, int], None],
) -> dict[int | None, Highest]:
    wanted = {layer: unit(features.vectors(layer, ids)).T for layer in layers}
    best: dict[int | None, Highest] = {layer: Highest(count, len(ids)) for layer in layers}
    mean = np.zeros((features.vocabulary, len(ids)), np.float32)
    for block in features.blocks(layers, progress):
        cosines = unit(block.vectors) @ wanted[block.layer]  # [N, U]
        cosines[block.ids[:, None] == ids] = _ITSELF
        best[block.layer].add(block.ids, cosines)
        mean[block.ids] += cosines / len(layers)
    mean[ids, np.arange(len(ids))] = _ITSELF
    if len(layers) > 1:
        best[None] = Highest(count, len(ids))
        best[None].add(np.arange(features.vocabulary), mean)
    return best
