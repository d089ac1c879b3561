"""One figure per layer: the neighbour graph, outliers, lengths, layers left out, gains."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import edge_memllm
from edge_memllm import RequestError
from edge_memllm.evaluation import Item, Task, measure_divergence, measure_perplexity, measure_task
from edge_memllm.interpretation.curves import (
    GAINS,
    clustering_coefficient,
    layer_curves,
    memory_effects,
    scrambled,
    task_sweep,
)
from edge_memllm.interpretation.memory import TableMemory, unit
from edge_memllm.interpretation.texts import Fed, scaled_gain, without_layers
from support.checkpoints import VOCABULARY, MakeArtifact, MakeCheckpoint
from support.interpretation import network_memory
from support.small_model import open_small_model, write_small_artifact

TEXT = "The cat sat on the mat, and the dog on the log."
EVERY = np.arange(VOCABULARY)


def by_hand(points: np.ndarray, neighbours: int) -> float:
    """The definition, link by link."""
    cosines = points @ points.T
    links: set[frozenset[int]] = set()
    for place, row in enumerate(cosines):
        others = [other for other in np.argsort(-row, kind="stable") if other != place]
        links |= {frozenset((place, int(other))) for other in others[:neighbours]}
    shares = []
    for place in range(len(points)):
        mine = [other for other in range(len(points)) if frozenset((place, other)) in links]
        pairs = [frozenset(pair) in links for pair in combinations(mine, 2)]
        shares.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("neighbours", [1, 3, 8])
def test_the_clustering_coefficient_is_that_of_the_definition(
    neighbours: int, random: np.random.Generator
) -> None:
    points = unit(random.standard_normal((30, 5)).astype(np.float32))
    found = clustering_coefficient(points, neighbours)
    assert found == pytest.approx(by_hand(points, neighbours), abs=1e-6)


def test_groups_cluster_and_few_points_are_all_linked(random: np.random.Generator) -> None:
    centres = np.repeat(np.eye(4), 12, axis=0)
    points = unit((centres + 0.01 * random.standard_normal(centres.shape)).astype(np.float32))
    loose = unit(random.standard_normal(points.shape).astype(np.float32))
    assert clustering_coefficient(points) > clustering_coefficient(loose) + 0.1
    assert clustering_coefficient(points[:5]) == pytest.approx(1)


def test_scrambling_keeps_each_number_and_nothing_else(random: np.random.Generator) -> None:
    vectors = random.standard_normal((50, 1)).astype(np.float32) + np.arange(6, dtype=np.float32)
    found = scrambled(vectors, 0)
    assert np.array_equal(np.sort(found, axis=0), np.sort(vectors, axis=0))
    assert np.linalg.matrix_rank(found - found.mean(axis=0)) > 1
    assert np.array_equal(found, scrambled(vectors, 0))


def test_curves_of_a_checkpoint(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(beta=1))
    found = layer_curves(memory, layers=[1, 0])
    assert found.layers == (1, 0)
    assert found.clustering is not None
    assert found.outliers is not None
    assert found.norms is not None
    assert (found.dropped, found.gains) == (None, None)
    for place, layer in enumerate(found.layers):
        coefficients = memory.coefficients(layer, EVERY)
        points = unit(coefficients - coefficients.mean(axis=0))
        right = clustering_coefficient(points)
        assert found.clustering.values[place] == pytest.approx(right, abs=1e-3)
        sizes = np.abs(coefficients)
        outside = [int((one > one.mean() + 3 * one.std()).sum()) for one in sizes]
        assert found.outliers.values[place] == pytest.approx(np.mean(outside), abs=0.02)
        lengths = np.linalg.norm(memory.rows(layer, EVERY), axis=1)
        assert found.norms.values[place] == pytest.approx(lengths.mean(), rel=1e-5)


def test_outliers_of_normal_numbers_are_their_control(random: np.random.Generator) -> None:
    class Normal:
        layers, keys, width, vocabulary = 1, 400, 4, VOCABULARY

        def coefficients(self, layer: int, ids: np.ndarray, keys: None = None) -> np.ndarray:
            return np.random.default_rng(0).standard_normal((len(ids), 400)).astype(np.float32)

        def values(self, layer: int, keys: None = None) -> np.ndarray:
            raise NotImplementedError

        def rows(self, layer: int, ids: np.ndarray) -> np.ndarray:
            return np.ones((len(ids), 4), np.float32)

        embeddings = None

    found = layer_curves(Normal(), layers=[0])
    assert found.outliers is not None
    assert found.outliers.control is not None
    assert found.outliers.control[0] == pytest.approx(found.outliers.values[0], rel=0.1)
    assert found.norms is not None
    assert found.norms.values == (2.0,)


def test_curves_of_an_artifact_with_a_text_and_tasks(make_artifact: MakeArtifact) -> None:
    task = Task("choices", "choices", (Item(("The cat",), (" sat", " ran")),), "recall")
    seen: list[str] = []
    path = make_artifact(beta=1, graph_weights="fp32", table_codec="f32")
    with edge_memllm.load(path, device="cpu", threads=1) as model:
        found = layer_curves(
            TableMemory(model),
            layers=[0, 1],
            model=model,
            corpus=TEXT,
            tasks=[task],
            progress=lambda stage, done, total: seen.append(stage),
        )
        whole = measure_perplexity(model, TEXT).perplexity
        spec = model.manifest.model
        for layer in (0, 1):
            _, gain = without_layers(spec.memory, model.source, [layer])
            right = measure_divergence(model, model, TEXT, memory_gain=gain)
            assert found.dropped is not None
            assert found.dropped.values[layer] == pytest.approx(right.kl.mean(), rel=1e-4)
        gain = scaled_gain(spec, [0.5, 0.5])
        half = measure_task(model, task, memory_gain=gain).scores["acc"].value
    assert found.outliers is None
    assert found.gains is not None
    assert found.gains.gains == GAINS
    text, recall = found.gains.groups
    assert (text.name, text.metric) == ("text", "perplexity")
    assert text.values[0] == pytest.approx(whole, rel=1e-5)
    assert (recall.name, recall.metric, recall.values[-1]) == ("recall", "accuracy", half)
    assert list(dict.fromkeys(seen)) == ["curves", "layer off", "gains", "tasks"]


@pytest.mark.parametrize("fields", [{}, {"memory_gain": [0.5, -2.0]}, {"memory_source": "both"}])
def test_factors_multiply_a_models_own_gains(
    fields: dict[str, object], make_checkpoint: MakeCheckpoint, make_artifact: MakeArtifact
) -> None:
    own = np.array(fields.get("memory_gain", [1.0, 1.0]))
    factors = [0.5, 0.0]
    changed = {**fields, "memory_gain": (own * factors).tolist()}
    exact = {"graph_weights": "fp32", "table_codec": "f32"}
    with (
        edge_memllm.load(make_artifact(**exact, **fields), device="cpu", threads=1) as model,
        edge_memllm.load(make_artifact(**exact, **changed), device="cpu", threads=1) as right,
    ):
        gain = scaled_gain(model.manifest.model, factors)
        found = measure_perplexity(model, TEXT, memory_gain=gain)
        assert found.nll == pytest.approx(measure_perplexity(right, TEXT).nll, rel=1e-6)
        (effect,) = memory_effects(model, TEXT, [Fed(model.source, gain)])
        assert effect.perplexity == pytest.approx(found.perplexity, rel=1e-5)
        (nothing,) = memory_effects(model, TEXT, [Fed(model.source, own.tolist())])
        assert nothing.divergence == 0


def test_gains_are_those_of_a_text_alone(make_artifact: MakeArtifact) -> None:
    path = make_artifact(graph_weights="fp32", table_codec="f32")
    with edge_memllm.load(path, device="cpu", threads=1) as model:
        before = measure_perplexity(model, TEXT)
        assert measure_perplexity(model, TEXT, memory_gain=[0.0, 0.0]) != before
        assert measure_perplexity(model, TEXT) == before


def test_a_memory_that_all_layers_share_is_off_in_all(make_artifact: MakeArtifact) -> None:
    path = make_artifact(memory_sharing="all_layers", num_hidden_layers=3)
    with edge_memllm.load(path, device="cpu", threads=1) as model:
        found = layer_curves(TableMemory(model), layers=[0], model=model, corpus=TEXT)
        (effect,) = memory_effects(model, TEXT, [Fed(model.source, [0.0] * 3)])
    assert found.dropped is not None
    assert found.dropped.values == (effect.divergence,)
    assert effect.divergence > 0


def test_without_one_layer_the_others_stay(make_artifact: MakeArtifact) -> None:
    with edge_memllm.load(make_artifact(), device="cpu", threads=1) as model:
        found = without_layers(model.manifest.model.memory, model.source, [1])
        assert found == (model.source, [1.0, 0.0])


def test_what_cannot_be_scaled_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    with (
        edge_memllm.load(make_artifact(beta=8), device="cpu", threads=1) as dense,
        pytest.raises(RequestError, match="no token memory"),
    ):
        scaled_gain(dense.manifest.model, [1.0, 1.0])
    with open_small_model(write_small_artifact(tmp_path / "a").path) as model:
        with pytest.raises(RequestError, match="3 factors were given, expected one for each of"):
            scaled_gain(model.manifest.model, [1.0] * 3)
        with pytest.raises(RequestError, match="layer 9 has no memory"):
            layer_curves(TableMemory(model), layers=[9])


def test_tasks_are_grouped_by_their_folder(tmp_path: Path) -> None:
    item = Item(("The cat",), (" sat", " ran"))
    tasks = [
        Task("a/one", "choices", (item,), "a"),
        Task("alone", "choices", (item,)),
        Task("a/two", "choices", (Item(item.contexts, item.continuations, 1),), "a"),
    ]
    seen: list[tuple[int, int]] = []
    with open_small_model(write_small_artifact(tmp_path / "a").path) as model:
        found = task_sweep(model, tasks, (1.0, 0.5), lambda *at: seen.append(at))
        right = [
            [
                measure_task(model, task, memory_gain=[gain] * 2).scores["acc"].value
                for task in tasks
            ]
            for gain in (1.0, 0.5)
        ]
    assert [each.name for each in found] == ["a", "alone"]
    assert found[0].values == tuple((one + two) / 2 for one, _, two in right)
    assert found[1].values == tuple(alone for _, alone, _ in right)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
