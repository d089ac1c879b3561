"""What looking into a memory is tested on: networks of every kind, and made-up findings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from edge_memllm.interpretation.findings import (
    Agreement,
    Choice,
    Cluster,
    Curve,
    DirectParts,
    Explanation,
    GainGroup,
    GainSweep,
    KeyCard,
    KeyUse,
    LayerClusters,
    LayerCurves,
    LayerUse,
    MapPoint,
    ModelFacts,
    Scored,
    Sentence,
    SimilarTokens,
    Token,
    TokenCard,
)
from edge_memllm.interpretation.network import NetworkMemory

WITH_KEYS: dict[str, dict[str, Any]] = {
    "memoryllm": {},
    **{f"beta {beta}": {"beta": beta} for beta in (1, 2, 3, 7)},
    "more compute": {"beta": 3},
    "shared norm": {"memory_norm": "shared"},
    "one memory": {"memory_sharing": "all_layers", "beta": 1},
    "rows beside FFN-M": {"memory_source": "both"},
    "one memory beside rows": {"memory_sharing": "all_layers", "memory_source": "both"},
    "gains": {"memory_gain": [0.5, -2.0]},
    "tied, grouped, normed": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "attention_bias": True,
    },
}
WITHOUT_KEYS: dict[str, dict[str, Any]] = {
    "table": {"memory_source": "table"},
    "one table": {"memory_source": "table", "memory_sharing": "all_layers", "beta": 2},
}
WITH_MEMORY = {**WITH_KEYS, **WITHOUT_KEYS}


def network_memory(checkpoint: Path) -> NetworkMemory:
    from edge_memllm_export.checkpoint import Checkpoint

    return NetworkMemory(Checkpoint.open(checkpoint).architecture.reference().network)


# What would end a script or an element, run, reorder a line, or not be seen.
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<!--",
    "\u202egnol\u202c",
    "\u0000\u0007\u001b[31m",
    "\ud800",
    "\u2028\u2029\ufeff\u200b",
    "\u0301",
    " \u05e9\u05dc\u05d5\u05dd",
    "&lt;b&gt;",
    "\n",
    "",
)
WORDS = tuple(
    " the river runs by old houses where nobody lives any more".replace(" ", "\n ").split("\n")[1:]
)
ALL = (*WORDS, *HOSTILE)


def token(number: int) -> Token:
    return Token(number, ALL[number % len(ALL)])


def scored(seed: int, count: int = 6) -> tuple[Scored, ...]:
    drawn = np.random.default_rng(seed).normal(size=count)
    return tuple(Scored(token(seed + i), float(x)) for i, x in enumerate(sorted(drawn)[::-1]))


def key_card(layer: int, key: int) -> KeyCard:
    lists = (scored(key + shift) for shift in (0, 3, 5, 9))
    return KeyCard(layer, key, *lists)


def token_card(number: int, layers: int, *, keys: int = 5) -> TokenCard:
    uses = []
    for layer in range(layers):
        found = tuple(
            KeyUse(key_card(layer, 7 * i), (-1) ** i * 2.5 / (i + 1), 0.4 / (i + 1) * (-1) ** i)
            for i in range(keys)
        )
        half = 3 if keys else None
        uses.append(LayerUse(layer, 3.0 + layer, scored(layer), scored(layer + 4), found, half))
    return TokenCard(token(number), tuple(uses))


def sentence(
    layers: int, numbers: tuple[int, ...], *, direct: bool = True, seed: int = 0
) -> Sentence:
    """Direct parts add up; effects are small but for one token."""
    rng = np.random.default_rng(seed)
    T = len(numbers)
    with_memory = -rng.exponential(2.0, T)
    without = np.minimum(0, with_memory[:, None] - rng.normal(0.1, 0.4, (T, layers)))
    tokens = tuple(token(each) for each in numbers)
    parts = None
    if direct:
        attention, memory = rng.normal(0, 1, (T, layers)), rng.normal(0.3, 1, (T, layers))
        embedding = rng.normal(0, 1, T)
        logit = embedding + attention.sum(1) + memory.sum(1)
        parts = DirectParts(
            logit, rng.normal(0, 1, T), embedding, attention, np.zeros((T, layers)), memory
        )
    return Sentence(
        "".join(each.text for each in tokens),
        tokens,
        (*tokens[1:], token(3)),
        with_memory,
        without,
        np.minimum(-0.01, with_memory - rng.normal(0.8, 1.2, T)),
        parts,
    )


def layer_clusters(layer: int, clusters: int, points: int) -> LayerClusters:
    rng = np.random.default_rng(layer)
    centres = rng.normal(0, 8, (clusters, 2))
    places = rng.integers(0, clusters, points)
    at = centres[places] + rng.normal(0, 1.1, (points, 2))
    return LayerClusters(
        layer,
        "coefficients",
        8192,
        "the highest mean silhouette on 2,000 tokens",
        (Choice(8, 0.11), Choice(clusters, 0.19)),
        tuple(
            Cluster(
                f"words ending in -{'abc'[i % 3]}", 100 + i, (token(i), token(i + 5), token(i + 11))
            )
            for i in range(clusters)
        ),
        (
            Agreement("character class", 9, 0.71, 0.39, 41.2, 0.31, 0.0004, 0.66, 0.27, 8192),
            Agreement("frequency band", 5, 0.42, 0.33, 12.0, 0.09, -0.0001, 0.44, 0.1, 7000),
        ),
        "t-SNE, perplexity 30",
        tuple(
            MapPoint(token(i), float(x), float(y), int(place))
            for i, ((x, y), place) in enumerate(zip(at, places, strict=True))
        ),
    )


def layer_curves(layers: int) -> LayerCurves:
    rng = np.random.default_rng(5)

    def curve(name: str, words: str, *, control: bool = False) -> Curve:
        drawn = [tuple(float(x) for x in rng.uniform(0.2, 0.9, layers)) for _ in range(2)]
        return Curve(name, words, drawn[0], drawn[1] if control else None)

    gains = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    groups = (
        GainGroup("recall", "accuracy", (0.41, 0.4, 0.36, 0.3, 0.22, 0.15)),
        GainGroup("reasoning", "accuracy", (0.52, 0.52, 0.515, 0.51, 0.5, 0.5)),
        GainGroup("novels", "perplexity", (60.0, 66.0, 90.0, 160.0, 420.0, math.nan)),
    )
    return LayerCurves(
        tuple(range(layers)),
        curve(
            "Clustering coefficient", "How many neighbours of a token are neighbours.", control=True
        ),
        curve("Outliers per token", "Coefficients beyond three standard deviations."),
        curve("Length of rows", "Mean over all tokens."),
        curve("Layer left out", "KL divergence in nats with the layer's memory off."),
        GainSweep(gains, groups, "All memory multiplied by one number."),
    )


def model_facts(layers: int, *, name: str = "made-up") -> ModelFacts:
    gain = (1.0,) * layers
    return ModelFacts(
        name, "checkpoint", "sha256:" + "ab" * 32, 0, layers, layers, 256, 8192, 680, gain
    )


def explanation(
    layers: int = 3, *, points: int = 200, clusters: int = 14, hostile: bool = True
) -> Explanation:
    count = len(ALL) if hostile else len(WORDS)
    similar = tuple(
        SimilarTokens(token(1), layer, "coefficients", scored(8))
        for layer in (*range(layers), None)
    )
    return Explanation(
        model=model_facts(layers, name=HOSTILE[0] if hostile else "made-up"),
        command="edge-memllm explain checkpoint --text '<b>' --html report.html",
        tokens=(token_card(1, layers), token_card(len(WORDS), layers)),
        keys=(key_card(0, 17), key_card(1, 5)),
        sentences=(sentence(layers, tuple(range(count))),),
        similar=similar,
        clusters=tuple(layer_clusters(layer, clusters, points) for layer in range(layers)),
        curves=layer_curves(layers),
    )
