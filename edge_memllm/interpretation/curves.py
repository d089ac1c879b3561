"""One figure for each layer, of several kinds: how the layers of a memory differ.

docs/explain.md sets them beside the curves of the paper, which defines none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_memllm.evaluation import Task
from edge_memllm.interpretation.features import (
    Features,
    check_layers,
    features_of,
    sample_tokens,
    unit,
)
from edge_memllm.interpretation.findings import Curve, GainGroup, GainSweep, LayerCurves
from edge_memllm.interpretation.gained_runtime import without_layer
from edge_memllm.interpretation.importance import gain_effects, task_sweep
from edge_memllm.interpretation.memory import Memory
from edge_memllm.interpretation.neighbours import NEIGHBOURS, clustering_coefficient, scrambled
from edge_memllm.predictor import Predictor

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

GAINS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_GRAPH, _SAMPLE = 2000, 8192  # tokens
_DEVIATIONS = 3


def layer_curves(
    source: Memory,
    *,
    layers: Sequence[int],
    progress: Progress = lambda *_: None,
    model: Predictor | None = None,
    corpus: str | None = None,
    tasks: Sequence[Task] = (),
    seed: int = 0,
) -> LayerCurves:
    """Return the curves of some layers.

    Outliers need coefficients. With a `model` and a `corpus` come what it costs to leave a layer's
    memory out, and the sweep of the gain; `tasks` join the sweep. Raises `RequestError` for layers
    that are not there, and as `gain_effects`.
    """
    features, rows = features_of(source), features_of(source, "rows")
    check_layers(layers, features.layers)
    found: dict[str, list[tuple[float, float]]] = {"clustering": [], "outliers": [], "norms": []}
    progress("curves", 0, len(layers))
    for number, layer in enumerate(layers, 1):
        found["clustering"].append(_clustering(features, layer, seed))
        if features.kind == "coefficients":
            found["outliers"].append(_outliers(features, layer, seed))
        found["norms"].append((_norm(rows, layer, seed), 0.0))
        progress("curves", number, len(layers))
    return LayerCurves(
        layers=tuple(layers),
        clustering=_with_control("clustering coefficient", _CLUSTERING, found["clustering"]),
        outliers=_with_control("outliers per token", _OUTLIERS, found["outliers"]),
        norms=Curve("length of rows", _NORMS, tuple(value for value, _ in found["norms"])),
        dropped=_dropped(model, layers, corpus, progress),
        gains=_gains(model, corpus, tasks, progress),
    )


_CLUSTERING = (
    f"Mean local clustering coefficient of the graph of the {NEIGHBOURS} nearest neighbours by "
    f"cosine, of {_GRAPH:,} tokens at most, their vectors less their mean. Control: each number of "
    "the vectors dealt out anew among the tokens."
)
_OUTLIERS = (
    f"Mean number of coefficients of a token that are larger in size than the mean of that token's "
    f"sizes by {_DEVIATIONS} standard deviations of them, of {_SAMPLE:,} tokens at most. Control: "
    "as many normal numbers."
)
_NORMS = f"Mean length of rows, without gain, of {_SAMPLE:,} tokens at most."
_DROPPED = (
    "Mean KL divergence in nats of the predictions of a text from those with the layer's memory "
    "off."
)


def _clustering(features: Features, layer: int, seed: int) -> tuple[float, float]:
    vectors = features.vectors(layer, sample_tokens(features, _GRAPH, seed))
    both = (vectors, scrambled(vectors, seed))
    found, control = (clustering_coefficient(unit(each - each.mean(axis=0))) for each in both)
    return found, control


def _outliers(features: Features, layer: int, seed: int) -> tuple[float, float]:
    sizes = np.abs(features.vectors(layer, sample_tokens(features, _SAMPLE, seed)))
    bounds = sizes.mean(axis=1) + _DEVIATIONS * sizes.std(axis=1)
    found = float((sizes > bounds[:, None]).sum(axis=1).mean())
    return found, features.size * _normal_outliers()


def _normal_outliers() -> float:
    """The share of normal numbers whose size is beyond the bound: size has these moments."""
    mean = math.sqrt(2 / math.pi)
    bound = mean + _DEVIATIONS * math.sqrt(1 - mean**2)
    return math.erfc(bound / math.sqrt(2))


def _norm(rows: Features, layer: int, seed: int) -> float:
    vectors = rows.vectors(layer, sample_tokens(rows, _SAMPLE, seed))
    return float(np.linalg.norm(vectors, axis=1).mean())


def _with_control(name: str, definition: str, pairs: Sequence[tuple[float, float]]) -> Curve | None:
    if not pairs:
        return None
    values, control = zip(*pairs, strict=True)
    return Curve(name, definition, values, control)


def _dropped(
    model: Predictor | None, layers: Sequence[int], corpus: str | None, progress: Progress
) -> Curve | None:
    if model is None or corpus is None:
        return None
    factors = [without_layer(model, layer) for layer in layers]
    effects = gain_effects(model, corpus, factors, lambda *at: progress("layer off", *at))
    return Curve("cost of leaving the layer out", _DROPPED, tuple(e.divergence for e in effects))


def _gains(
    model: Predictor | None, corpus: str | None, tasks: Sequence[Task], progress: Progress
) -> GainSweep | None:
    if model is None or (corpus is None and not tasks):
        return None
    groups: list[GainGroup] = []
    if corpus is not None:
        factors = [[gain] * model.manifest.model.num_hidden_layers for gain in GAINS]
        effects = gain_effects(model, corpus, factors, lambda *at: progress("gains", *at))
        groups.append(GainGroup("text", "perplexity", tuple(each.perplexity for each in effects)))
    groups.extend(task_sweep(model, tasks, GAINS, lambda *at: progress("tasks", *at)))
    return GainSweep(GAINS, tuple(groups))
