"""A memory by its keys: what they contribute adds up to what the network computes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from edge_memllm import ArtifactError, RequestError, load
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.evaluation.perplexity import measure_perplexity
from edge_memllm.interpretation.explaining import open_checkpoint
from edge_memllm.interpretation.keys import shares_of
from edge_memllm.interpretation.network import NetworkMemory
from support.checkpoints import LAYERS, VOCABULARY, MakeArtifact, MakeCheckpoint
from support.interpretation import WITH_KEYS, WITH_MEMORY, WITHOUT_KEYS, network_memory

IDS = np.array([0, 7, 65, 299])


def trained_rows(memory: NetworkMemory, layer: int) -> np.ndarray:
    """The part of the rows that no FFN-M makes."""
    table = memory.network.model.token_memory.rows
    if table is None:
        return np.zeros((len(IDS), memory.width), np.float32)
    rows = table.weight[torch.from_numpy(IDS)].detach().numpy()
    return rows.reshape(len(IDS), memory.layers, -1)[:, layer]


@pytest.mark.parametrize("case", WITH_KEYS)
def test_contributions_of_keys_sum_to_the_layers_output(
    case: str, make_checkpoint: MakeCheckpoint
) -> None:
    memory = network_memory(make_checkpoint(**WITH_KEYS[case]))
    whole = memory.all_rows(IDS)  # as the network feeds itself
    for layer in range(memory.layers):
        coefficients, values = memory.coefficients(layer, IDS), memory.values(layer)
        contributions = coefficients[:, :, None] * values  # [N, K, D]
        made = contributions.sum(axis=1) + trained_rows(memory, layer)
        np.testing.assert_allclose(made, whole[:, layer], atol=1e-4)
        np.testing.assert_allclose(memory.rows(layer, IDS), whole[:, layer], atol=1e-5)


@pytest.mark.parametrize("case", WITH_KEYS)
def test_taking_a_keys_contribution_away_is_computing_without_it(
    case: str, make_checkpoint: MakeCheckpoint
) -> None:
    memory = network_memory(make_checkpoint(**WITH_KEYS[case]))
    layer, key = memory.layers - 1, 5
    contribution = memory.coefficients(layer, IDS)[:, key, None] * memory.values(layer)[key]
    assert np.abs(contribution).max() > 1e-3
    without = NetworkMemory(copy.deepcopy(memory.network))
    feed_forward = without._network(layer)
    with torch.no_grad():
        weight = feed_forward.down_proj.weight.clone()
        weight[:, key] = 0
        feed_forward.down_proj.weight = torch.nn.Parameter(weight)
    expected = without.all_rows(IDS)[:, layer]
    np.testing.assert_allclose(memory.rows(layer, IDS) - contribution, expected, atol=1e-5)


@pytest.mark.parametrize("case", WITH_KEYS)
def test_shares_sum_to_one(case: str, make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(**WITH_KEYS[case]))
    for found in shares_of(memory, 0, IDS):
        assert found.shares.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
        strongest = found.strongest(3)
        assert np.abs(found.shares[strongest[0]]) == np.abs(found.shares).max()
        half = found.keys_for_half()
        falling = np.sort(found.shares)[::-1]
        assert falling[:half].sum() >= 0.5 > falling[: half - 1].sum()


def test_an_output_of_zero_has_no_parts(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint())
    silent = NetworkMemory(copy.deepcopy(memory.network))
    silent._network(0).down_proj.weight = torch.nn.Parameter(
        torch.zeros_like(silent._network(0).down_proj.weight)
    )
    assert not shares_of(silent, 0, IDS)[0].shares.any()


@pytest.mark.parametrize("case", WITH_MEMORY)
def test_gains_are_those_of_the_network(case: str, make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(**WITH_MEMORY[case]))
    model = memory.network.model
    expected = [float(model.memory_gain(layer)) for layer in range(LAYERS)]
    np.testing.assert_allclose(memory.gain, expected)
    if "gains" in case:
        np.testing.assert_allclose(memory.gain, [0.5, -2.0])


def test_some_keys_are_the_same_as_all_of_them(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(beta=1))
    some = [40, 3, 11]
    np.testing.assert_allclose(
        memory.coefficients(1, IDS, some), memory.coefficients(1, IDS)[:, some], atol=1e-6
    )
    np.testing.assert_array_equal(memory.values(1, some), memory.values(1)[some])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_half_precision_are_computed_in_float32(
    dtype: str, make_checkpoint: MakeCheckpoint
) -> None:
    memory = network_memory(make_checkpoint(dtype=dtype))
    made = memory.coefficients(0, IDS) @ memory.values(0)
    np.testing.assert_allclose(made, memory.all_rows(IDS)[:, 0], atol=1e-4)
    assert memory.embeddings(IDS).dtype == np.float32
    assert memory.head.directions(IDS).dtype == np.float32


@pytest.mark.parametrize("case", WITHOUT_KEYS)
def test_rows_that_no_network_makes_have_no_keys(
    case: str, make_checkpoint: MakeCheckpoint
) -> None:
    memory = network_memory(make_checkpoint(**WITHOUT_KEYS[case]))
    assert memory.keys is None
    np.testing.assert_array_equal(memory.rows(0, IDS), memory.all_rows(IDS)[:, 0])
    for ask in (lambda: memory.coefficients(0, IDS), lambda: memory.values(0)):
        with pytest.raises(RequestError, match=r"no keys: no FFN-M makes its rows \(memory_source"):
            ask()


def test_a_dense_network_has_no_memory(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(beta=8))
    assert memory.layers == 0
    assert memory.keys is None
    assert memory.vocabulary == VOCABULARY


def test_damaged_weights_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    memory = NetworkMemory(copy.deepcopy(network_memory(make_checkpoint()).network))
    memory.network.model.embed_tokens.weight = torch.nn.Parameter(
        torch.full_like(memory.network.model.embed_tokens.weight, torch.nan)
    )
    with pytest.raises(ArtifactError, match=r"numbers that are not finite\. It is damaged"):
        memory.coefficients(0, IDS)


@pytest.mark.parametrize("fields", [{}, {"beta": 2, "memory_sharing": "all_layers"}, {"beta": 8}])
def test_a_checkpoint_can_be_measured_as_a_model_is(
    fields: dict[str, Any], make_checkpoint: MakeCheckpoint, make_artifact: MakeArtifact
) -> None:
    text = "Whatever is measured on an artifact is measured on a checkpoint. " * 4
    model = open_checkpoint(make_checkpoint(**fields))
    found = measure_perplexity(model, text, context=64)
    exact = "none" if fields.get("beta") == 8 else "f32"
    assert model.manifest.table.codec == exact
    with load(make_artifact(graph_weights="fp32", table_codec="f32", **fields)) as artifact:
        expected = measure_perplexity(artifact, text, context=64)
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)
    model.source.announce([1, 2])
    assert model.source.fetch(np.array([3]), RecordBuffer(model.source.layout, 1)).bytes == 0
