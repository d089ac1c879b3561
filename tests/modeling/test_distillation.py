"""The losses and the layer schedule of a distillation, and the split of a feed-forward network."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from edge_memllm.modeling.distillation import LayerSchedule, divergence, hidden_distance
from edge_memllm.modeling.fitting import TokenGroups, activations, batch_and_steps, split_neurons
from edge_memllm.modeling.network import SwiGLU


def test_divergence_is_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 300, 50, generator=generator, requires_grad=True)
    target = torch.randn(2, 300, 50, generator=generator)
    ours = divergence(logits, target)
    (gradient,) = torch.autograd.grad(3 * ours, logits)
    plain = functional.kl_div(
        logits.flatten(0, 1).log_softmax(-1),
        target.flatten(0, 1).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    (expected,) = torch.autograd.grad(3 * plain, logits)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected)


def test_hidden_distance_measures_each_position_by_itself() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    found = wanted * torch.tensor([[[1.1], [0.9]]])
    assert hidden_distance(wanted, wanted) == 0
    assert float(hidden_distance(found, wanted)) == pytest.approx(0.01, rel=1e-4)


def test_schedule() -> None:
    assert LayerSchedule(6, 0, 100).converted(0) == 6
    schedule = LayerSchedule(6, 2, 100)
    assert [schedule.converted(step) for step in (0, 24, 25, 49, 50, 99)] == [2, 2, 4, 4, 6, 6]
    assert LayerSchedule(5, 3, 8).converted(4) == 5
    assert LayerSchedule(4, 9, 8).converted(0) == 4


def test_a_split_finds_the_neurons_that_matter() -> None:
    """Output of three neurons and of the token: nothing is lost when those three are kept."""
    torch.manual_seed(0)
    dense = SwiGLU(8, 24).requires_grad_(False)
    x, index = torch.randn(6000, 8), torch.randint(0, 10, (6000,))
    needed = torch.tensor([2, 11, 17])
    out = torch.randn(3, 8)
    wanted = activations(dense, x)[:, needed] @ out + torch.randn(10, 8)[index]
    dense.down_proj.weight.zero_()
    dense.down_proj.weight[:, needed] = out.T
    kept, weights = split_neurons(dense, 3, x, wanted, TokenGroups(index, 10))
    assert kept.tolist() == needed.tolist()
    torch.testing.assert_close(weights, out, rtol=1e-3, atol=1e-3)


def test_a_split_into_all_neurons_keeps_the_dense_weights() -> None:
    torch.manual_seed(1)
    dense = SwiGLU(8, 24).requires_grad_(False)
    x, index = torch.randn(3000, 8), torch.randint(0, 5, (3000,))
    kept, weights = split_neurons(dense, 24, x, dense(x), TokenGroups(index, 5))
    assert kept.tolist() == list(range(24))
    torch.testing.assert_close(weights, dense.down_proj.weight.T, rtol=1e-3, atol=1e-4)


def test_groups_add_up() -> None:
    index = torch.tensor([2, 0, 2, 2, 1])
    groups = TokenGroups(index, 3)
    assert groups.counts.tolist() == [1, 1, 3]
    ((positions, group),) = groups.chunks()
    assert positions.tolist() == [1, 4, 0, 2, 3]
    assert group.tolist() == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("vocabulary", [300, 1024, 8192, 50_000, 262_144])
def test_the_fit_of_rows_grows_with_the_vocabulary(vocabulary: int) -> None:
    batch, steps = batch_and_steps(vocabulary)
    assert batch <= vocabulary
    assert steps >= 600
    assert batch * steps >= 16 * vocabulary
    assert steps == 600 or batch * steps < 16 * vocabulary + batch
