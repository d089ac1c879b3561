"""Only the first layer in a table: what is fitted, and the artifact that has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import edge_memllm
from benchmarks.dense.first_export import export_pair
from benchmarks.dense.first_layer import Replacement, alone, in_the_text, replaced, replacement
from edge_memllm.evaluation.perplexity import token_losses
from edge_memllm.modeling.conversion import dense_network
from support.checkpoints import BOS, VOCABULARY, write_dense


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_dense(tmp_path / "dense", "llama")


def losses(logits: torch.Tensor) -> np.ndarray:
    ids = windows(1)[0, 1:]
    found: np.ndarray = -logits[0, :-1].log_softmax(-1)[torch.arange(len(ids)), ids].numpy()
    return found


def windows(count: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(97, 110, (count, 24), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = BOS
    return drawn


def test_all_neurons_are_the_network_with_rows_and_without(model: Path) -> None:
    network, ids, other = dense_network(model), windows(32), windows(4, 1)
    wanted = network(input_ids=other, use_cache=False).logits
    width = network.config.intermediate_size
    for unseen in (None, alone, in_the_text):
        made = replacement(network, ids, width, unseen, fitted=32)
        with replaced(network, made) as logits:
            assert torch.allclose(logits(other), wanted, atol=0.1)
    assert torch.equal(network(input_ids=other, use_cache=False).logits, wanted)


def test_rows_give_back_more_than_nothing_and_the_boundary_keeps_its_own(model: Path) -> None:
    network, ids, other = dense_network(model), windows(64), windows(4, 1)
    wanted = network(input_ids=other, use_cache=False).logits
    missed = {}
    for unseen in (None, alone, in_the_text):
        made = replacement(network, ids, 0, unseen, fitted=32)
        with replaced(network, made) as logits:
            found = logits(other)
        assert torch.allclose(found[:, 0], wanted[:, 0], atol=1e-3)
        missed[unseen] = (found - wanted).square().mean().item()
    assert max(missed[alone], missed[in_the_text]) < 0.9 * missed[None]


def test_every_token_is_planted_once_in_its_place(model: Path) -> None:
    """Where attention gives nothing, a token puts out the same wherever it stands."""
    network, ids = dense_network(model), windows(3)
    network.model.layers[0].self_attn.o_proj.weight.data.zero_()
    wanted = alone(network, ids, None)
    assert torch.allclose(in_the_text(network, ids, None), wanted, atol=1e-4)
    assert len(wanted) == VOCABULARY


def test_the_artifact_computes_what_the_replaced_network_does(model: Path, tmp_path: Path) -> None:
    network, ids = dense_network(model), windows(1)
    rows = torch.randn(
        VOCABULARY, network.config.hidden_size, generator=torch.Generator().manual_seed(3)
    )
    options = {"graph_weights": "fp32", "table_codec": "f32"}
    plain, table = export_pair(model, rows, tmp_path / "artifacts", **options)
    with replaced(network, Replacement(None, rows, 0.0)) as logits:
        wanted = losses(logits(ids))
    dense = losses(network(input_ids=ids, use_cache=False).logits)
    for artifact, expected in ((table, wanted), (plain, dense)):
        with edge_memllm.load(artifact, device="cpu") as loaded:
            text = ids[0].tolist()
            parts = token_losses(loaded.runtime, loaded.source, text, context=64, stride=64)
            found = np.concatenate(list(parts))
        assert np.allclose(found, expected, atol=2e-3)
    assert not np.allclose(wanted, dense, atol=0.1)
