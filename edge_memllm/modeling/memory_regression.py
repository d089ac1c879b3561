"""FFN-M fitted to given rows: a regression over the vocabulary, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from edge_memllm.modeling.network import DecoderLayer, MemoryLLMModel

_STEPS, _PASSES = 600, 16  # at least so many steps, and draws of each token in the mean
_BATCH = 1024  # tokens a step, or the whole vocabulary where that is less
_RATE = 5e-3  # for an FFN-M of 256 columns; less for wider ones

Progress = Callable[[str, int, int], None]


def fit_memory_networks(
    network: MemoryLLMModel, rows: torch.Tensor, counts: torch.Tensor, progress: Progress
) -> None:
    """Fit every layer's FFN-M to its ``rows`` [V, L, D].

    A token is drawn the more often the higher its ``counts`` [V], by their square root: rare
    tokens have rows too. Deterministic.
    """
    source = network.embed_tokens.weight.detach()
    if network.token_memory.norm is not None:
        source = network.token_memory.norm(source).detach()
    weights = counts.double().sqrt().cpu()
    for number, layer in enumerate(network.layers):
        _fit(layer, source, rows[:, number], weights, torch.Generator().manual_seed(number))
        progress("memory", number + 1, len(network.layers))


def batch_and_steps(vocabulary: int) -> tuple[int, int]:
    """Tokens drawn in a step, and steps, of the fit over a vocabulary of so many tokens."""
    batch = min(_BATCH, vocabulary)
    return batch, max(_STEPS, math.ceil(_PASSES * vocabulary / batch))


def _fit(
    layer: DecoderLayer,
    source: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    generator: torch.Generator,
) -> None:
    rate = _RATE * (256 / source.shape[1]) ** 0.5
    parameters = [*layer.memory.parameters(), *layer.memory_layernorm.parameters()]
    batch, steps = batch_and_steps(len(rows))
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    scale = rows.square().mean()
    with torch.enable_grad():
        for _ in range(steps):
            drawn = torch.multinomial(weights, batch, replacement=True, generator=generator)
            drawn = drawn.to(rows.device)
            missed = layer.recall(source[drawn], None) - rows[drawn]
            loss = missed.square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
