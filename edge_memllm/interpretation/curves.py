"""One figure for each layer, of several kinds: how the layers of a memory differ.

docs/explain.md sets them beside the curves of the paper, which defines none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Floats, Logits
from edge_memllm.evaluation import Task, mean_result, measure_task
from edge_memllm.evaluation.perplexity import (
    Predictor,
    divergences,
    exponential,
    predictions,
    text_tokens,
)
from edge_memllm.interpretation.findings import Curve, GainGroup, GainSweep, LayerCurves
from edge_memllm.interpretation.gates import GAINS as GATE_GAINS
from edge_memllm.interpretation.gates import are_gates
from edge_memllm.interpretation.memory import (
    Features,
    Memory,
    check_layers,
    features_of,
    sample_tokens,
    unit,
)
from edge_memllm.interpretation.texts import Fed, scaled_gain, without_layers
from edge_memllm.mixed_precision.sensitivity import sample_windows
from edge_memllm.progress import Counted, Progress
from edge_memllm.sampling import next_token_losses

Window = NDArray[np.int64]


NEIGHBOURS = 10

GAINS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_GRAPH, _SAMPLE = 2000, 8192  # tokens
_DEVIATIONS = 3


@dataclass(frozen=True, slots=True)
class Effect:
    """What changed gains do to the predictions of a text, in nats per token."""

    divergence: float  # mean KL divergence of the model's predictions from the changed ones
    loss: float  # mean negative log-likelihood with the change

    @property
    def perplexity(self) -> float:
        """Of the text, with the change."""
        return exponential(self.loss)


def memory_effects(
    model: Predictor,
    text: str,
    changes: Sequence[Fed],
    progress: Counted = lambda done, total: None,
) -> list[Effect]:
    """Return what each of `changes` does on windows spread over a text.

    At most 2,048 tokens are predicted, of large models 512: each from those before it in its
    window. Raises `RequestError` for a text with nothing to predict.
    """
    spec = model.manifest.model
    tokens = np.asarray(text_tokens(model, text).fed, np.int64)
    windows = sample_windows(
        tokens, spec.vocab_size, model.source.layout, spec.max_position_embeddings
    )
    sums, count = np.zeros((len(changes), 2)), 0
    for number, window in enumerate(windows):
        truth = [(logits.copy(), targets) for logits, targets in _predicted(model, window)]
        count += len(window) - 1
        for place, change in enumerate(changes):
            changed = _predicted(model, window, change)
            for (right, targets), (logits, _) in zip(truth, changed, strict=True):
                sums[place, 0] += divergences(right, logits).sum()
                sums[place, 1] += next_token_losses(logits, targets).sum()
            progress(number * len(changes) + place + 1, len(windows) * len(changes))
    return [Effect(*each) for each in (sums / count).tolist()]


def task_sweep(
    model: Predictor,
    tasks: Sequence[Task],
    gains: Sequence[float],
    progress: Counted = lambda done, total: None,
) -> tuple[GainGroup, ...]:
    """Return how well a model does on each group of tasks at each of the gains.

    A task's group is the folder it was read from, otherwise the task itself; a group's figure is
    the mean accuracy of its tasks.
    """
    spec = model.manifest.model
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group or task.name, []).append(task)
    figures: dict[str, list[float]] = {name: [] for name in groups}
    for number, gain in enumerate(gains):
        scaled = scaled_gain(spec, [gain] * spec.num_hidden_layers)
        for place, (name, members) in enumerate(groups.items(), 1):
            result = mean_result(
                name, [measure_task(model, each, memory_gain=scaled) for each in members]
            )
            figures[name].append(result.scores["acc"].value)
            progress(number * len(groups) + place, len(gains) * len(groups))
    return tuple(GainGroup(name, "accuracy", tuple(each)) for name, each in figures.items())


def _predicted(
    model: Predictor, window: Window, change: Fed | None = None
) -> Iterator[tuple[Logits, Sequence[int]]]:
    tokens: list[int] = window.tolist()
    source, gain = change or (model.source, None)
    return predictions(
        model.runtime,
        source,
        tokens,
        context=len(tokens),
        stride=len(tokens),
        memory_gain=gain,
    )


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
    that are not there, and as `memory_effects`.
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
_GAINS = "All memory multiplied by one number, the paper's alpha; nothing is trained again."


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
    spec, every = model.manifest.model, range(model.manifest.model.num_hidden_layers)
    shared = spec.memory.layers == 1
    changes = [
        without_layers(spec.memory, model.source, every if shared else [layer]) for layer in layers
    ]
    effects = memory_effects(model, corpus, changes, lambda *at: progress("layer off", *at))
    return Curve("cost of leaving the layer out", _DROPPED, tuple(e.divergence for e in effects))


def _gains(
    model: Predictor | None, corpus: str | None, tasks: Sequence[Task], progress: Progress
) -> GainSweep | None:
    if model is None or (corpus is None and not tasks):
        return None
    spec = model.manifest.model
    groups: list[GainGroup] = []
    if corpus is not None:
        factors = [[gain] * spec.num_hidden_layers for gain in GAINS]
        changes = [Fed(model.source, scaled_gain(spec, each)) for each in factors]
        effects = memory_effects(model, corpus, changes, lambda *at: progress("gains", *at))
        groups.append(GainGroup("text", "perplexity", tuple(each.perplexity for each in effects)))
    groups.extend(task_sweep(model, tasks, GAINS, lambda *at: progress("tasks", *at)))
    return GainSweep(GAINS, tuple(groups), GATE_GAINS if are_gates(spec.memory) else _GAINS)
