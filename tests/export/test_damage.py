"""The expected damage of an error in a matrix, against the divergence that it causes."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from torch import nn

from edge_memllm.errors import StorageError
from edge_memllm_export.weights.damage import INPUT_BLOCKS, Sensitivity, measure_sensitivities

VOCABULARY, WIDTH = 13, 16


class Network(nn.Module):
    """Two layers and a head: enough for a gradient to pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.left, self.right = nn.Linear(WIDTH, 8, bias=False), nn.Linear(WIDTH, 8, bias=False)
        self.second = nn.Linear(16, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        self.fed = x
        y = torch.cat([self.left(x), self.right(x)], dim=-1)
        logits: torch.Tensor = self.head(x + self.second(torch.tanh(y)))
        return logits


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(3)
    return Network()


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    return list(torch.randint(VOCABULARY, (6, 4, 100), generator=torch.Generator().manual_seed(5)))


def measured(network: Network, windows: list[torch.Tensor]) -> dict[str, Sensitivity]:
    matrices = {"first": (network.left, network.right), "head": (network.head,)}
    return measure_sensitivities(network, matrices, network, windows)


def divergence(network: Network, windows: list[torch.Tensor], error: torch.Tensor) -> float:
    """Nats per token that an error of the first matrix causes."""
    ids = torch.cat(windows)
    with torch.no_grad():
        true = torch.log_softmax(network(ids), dim=-1)
        before = network.left.weight.clone(), network.right.weight.clone()
        network.left.weight += error[:8]
        network.right.weight += error[8:]
        found = torch.log_softmax(network(ids), dim=-1)
        network.left.weight.copy_(before[0])
        network.right.weight.copy_(before[1])
    return float((true.exp() * (true - found)).sum(dim=-1).mean())


def test_expected_damage_is_the_divergence(network: Network, windows: list[torch.Tensor]) -> None:
    sensitivity = measured(network, windows)["first"]
    expected, caused = 0.0, 0.0
    for seed in range(20):
        error = 0.02 * torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed))
        expected += sensitivity.of_error(error.numpy())
        caused += divergence(network, windows, error)
    assert caused == pytest.approx(expected, rel=0.25)


def test_rows_are_those_of_the_modules_in_turn(
    network: Network, windows: list[torch.Tensor]
) -> None:
    found = measured(network, windows)
    assert found["first"].rows.shape == (16,)
    assert found["head"].rows.shape == (VOCABULARY,)
    assert found["first"].moment.shape == (WIDTH, WIDTH)
    for each in found.values():
        assert each.rows.sum() == pytest.approx(1, rel=1e-4)


def test_the_network_is_left_as_it_was(network: Network, windows: list[torch.Tensor]) -> None:
    network.second.weight.requires_grad_(False)
    measured(network, windows)
    assert [each.requires_grad for each in network.parameters()] == [True, True, True, False, True]
    assert all(each.grad is None for each in network.parameters())
    assert not any(each._forward_hooks for each in network.modules())
    network.second.weight.requires_grad_(True)


def test_the_same_seed_measures_the_same(network: Network, windows: list[torch.Tensor]) -> None:
    one, two = measured(network, windows), measured(network, windows)
    np.testing.assert_array_equal(one["head"].moment, two["head"].moment)


def test_rounded_inputs_cost_what_they_were_expected_to(
    network: Network, windows: list[torch.Tensor]
) -> None:
    """Inputs of the first matrix, rounded to 8 bits by blocks: here coarser, to be measurable."""
    sensitivity = measured(network, windows)["first"]
    weight = torch.cat([network.left.weight, network.right.weight]).detach().numpy()
    for block in INPUT_BLOCKS:
        expected = 32**2 * sensitivity.of_rounded_inputs(weight, [block])[block]
        assert input_divergence(network, windows, 127 / 32) == pytest.approx(expected, rel=0.3)


def test_every_window_is_told_of(network: Network, windows: list[torch.Tensor]) -> None:
    done: list[int] = []
    matrices = {"head": (network.head,)}
    measure_sensitivities(network, matrices, network, windows, done.append)
    assert done == [1, 2, 3, 4, 5, 6]


def test_moments_that_are_large_lie_in_a_file(
    network: Network, windows: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measured(network, windows)
    monkeypatch.setattr("edge_memllm_export.weights.damage._IN_MEMORY", 0)
    found = measured(network, windows)
    np.testing.assert_array_equal(found["first"].moment, expected["first"].moment)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="The disk is full"):
        measured(network, windows)
    assert not any(each._forward_hooks for each in network.modules())


def input_divergence(network: Network, windows: list[torch.Tensor], codes: float) -> float:
    """Nats per token that inputs of the first matrix cost, rounded to so many codes a side."""

    def rounded(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        step = inputs[0].abs().amax(dim=-1, keepdim=True) / codes
        return (torch.round(inputs[0] / step) * step,)

    ids = torch.cat(windows)
    with torch.no_grad():
        true = torch.log_softmax(network(ids), dim=-1)
        handles = [
            each.register_forward_pre_hook(rounded) for each in (network.left, network.right)
        ]
        found = torch.log_softmax(network(ids), dim=-1)
    for handle in handles:
        handle.remove()
    return float((true.exp() * (true - found)).sum(dim=-1).mean())
