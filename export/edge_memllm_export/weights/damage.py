"""What rounding a matrix costs the whole network, in nats: known from one pass back through it.

An error D of a matrix adds D x to an output whose gradient is g. To second order the divergence of
the network's predictions is E[(g D x)^2] / 2, where g is the gradient of the loss on a token that
the network itself drew (the Fisher information). Taking the rows of the output as independent, that
is sum_n share_n D_n G D_n^T / 2 with G = E[|g|^2 x x^T]: all that is kept of a pass are |g|^2 of
every token and the rows' shares in it. Codes should be chosen by G too: it knows which tokens
matter. Some networks have activations a thousand times as large at the first position of a text as
elsewhere; X^T X counts it too much, and a text without it costs everything.
It knows torch modules, nothing of our network, of files and of graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_memllm.arrays import Floats


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much the loss minds errors in the output of one matrix."""

    tokens: Floats  # [T]: |g|^2, of every token of the text in its order
    rows: Floats  # [N]: the share of each row of the matrix in all of it; they add up to 1


def measure_sensitivities(
    network: nn.Module,
    matrices: Mapping[str, Sequence[nn.Module]],
    logits: Callable[[torch.Tensor], torch.Tensor],
    windows: Iterable[torch.Tensor],
    seed: int = 0,
) -> dict[str, Sensitivity]:
    """Return how sensitive the network is to each matrix.

    ``matrices`` are linear modules of it by name; several are one matrix whose rows they make up in
    turn. ``logits`` runs the network, each of these modules once, from ids [B, T] to [B, T, V]; of
    ``windows`` [B, T] each is run by itself. No parameter gathers a gradient. The same seed draws
    the same tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {name: [_Squares() for _ in modules] for name, modules in matrices.items()}
    handles = [
        module.register_forward_hook(partial(_listen, squares))
        for name, modules in matrices.items()
        for module, squares in zip(modules, sums[name], strict=True)
    ]
    learning = [each for each in network.parameters() if each.requires_grad]
    try:
        for each in learning:
            each.requires_grad_(False)
        for ids in windows:
            _pass_back(logits, ids, generator)
    finally:
        for each in learning:
            each.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return {name: _joined(each) for name, each in sums.items()}


def damage(missed: Floats, sensitivity: Sensitivity, moment: Floats) -> float:
    """Return the divergence in nats per token that an error of a matrix is expected to cause.

    ``missed`` [N, K] is what was stored less what it should be, ``moment`` [K, K] the mean of
    ``sensitivity.tokens[t] * x_t x_t^T`` over tokens.
    """
    rows = np.einsum("nk,nk->n", missed @ moment, missed)
    return float(sensitivity.rows.astype(np.float64) @ rows) / 2


class _Squares:
    """Squares of the gradients of one module's output, gathered over windows."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.rows: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor) -> None:
        squares = gradient.detach().float().flatten(0, -2).square()
        self.tokens.append(squares.sum(dim=1))
        rows = squares.sum(dim=0)
        self.rows = rows if self.rows is None else self.rows + rows


@torch.enable_grad()
def _pass_back(
    logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, generator: torch.Generator
) -> None:
    """Run a window, draw a token at every position, and pass the loss of these tokens back."""
    chances = torch.log_softmax(logits(ids).float(), dim=-1).flatten(0, -2)
    drawn = torch.multinomial(chances.detach().exp(), 1, generator=generator)
    (-chances.gather(1, drawn).sum()).backward()


def _listen(squares: _Squares, _: nn.Module, __: Any, output: torch.Tensor) -> None:
    if not output.requires_grad:  # the first matrices of the network
        output.requires_grad_()
    output.register_hook(squares.add)


def _joined(parts: Sequence[_Squares]) -> Sensitivity:
    """The sensitivity of a matrix whose rows are those of several modules."""
    tokens = torch.stack([torch.cat(part.tokens) for part in parts]).sum(dim=0)
    rows = torch.cat([part.rows for part in parts if part.rows is not None])
    total = rows.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return Sensitivity(tokens.numpy(), (rows / total).numpy())
