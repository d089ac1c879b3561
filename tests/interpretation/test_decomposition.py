"""Logits as sums of what the parts of a network put into the stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_memllm.interpretation.network import direct_parts
from support.checkpoints import LAYERS, MakeCheckpoint
from support.interpretation import WITH_MEMORY, network_memory

TEXT = np.array(list(b"The river runs to the sea."))
CASES = {**WITH_MEMORY, "dense": {"beta": 8}, "half": {"dtype": "float16", "beta": 2}}


def logits_of(memory, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return memory.network(torch.from_numpy(ids)[None]).logits[0].double().numpy()


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_a_logit_sum_to_it(case: str, make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(**CASES[case]))
    targets = np.append(TEXT[1:], 3)
    found = direct_parts(memory, TEXT, targets)
    logits = logits_of(memory, TEXT)
    wanted = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    layered = sum(part.sum(axis=1) for part in (found.attention, found.compute, found.memory))
    np.testing.assert_allclose(found.embedding + layered, found.logit, atol=2e-4)
    np.testing.assert_allclose(found.logit + found.mean_logit, wanted, atol=2e-4)
    np.testing.assert_allclose(found.mean_logit, logits.mean(axis=1), atol=2e-4)
    for part in (found.attention, found.compute, found.memory):
        assert part.shape == (len(TEXT), LAYERS)


def test_parts_that_a_network_lacks_are_zero(make_checkpoint: MakeCheckpoint) -> None:
    plain, dense = (
        direct_parts(network_memory(make_checkpoint(beta=beta)), TEXT, TEXT) for beta in (0, 8)
    )
    assert not plain.compute.any()
    assert plain.memory.any()
    assert not dense.memory.any()
    assert dense.compute.any()


def test_a_memory_turned_off_puts_nothing_in(make_checkpoint: MakeCheckpoint) -> None:
    found = direct_parts(
        network_memory(make_checkpoint(memory_gain=[0.0, 1.0])), TEXT, np.flip(TEXT).copy()
    )
    assert not found.memory[:, 0].any()
    assert found.memory[:, 1].any()


def test_no_hook_is_left_behind(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(beta=1))
    direct_parts(memory, TEXT, TEXT)
    for module in memory.network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
