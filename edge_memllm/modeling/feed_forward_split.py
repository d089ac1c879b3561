"""A dense feed-forward network split in two: fewer neurons, and rows that depend on the token.

The dense output ``y`` is approached by ``a_S W + M[t]``: activations ``a`` of some neurons ``S``
with output weights ``W`` of their own, and one row per token. For given ``S`` this is a linear
regression. Rows are free, so what they can say is taken out of it first: only how activations
and outputs vary within one token decides on ``S`` and ``W``, and the rows are what is left.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from edge_memllm.modeling.feed_forward import SwiGLU

_CHUNK = 4096  # positions worked on at once
_ROUNDS = 64  # in which neurons are dropped; one at a time is no better
_RIDGE = 1e-2  # of the mean variance of a neuron: pulls to the dense output weights


class TokenGroups:
    """Positions of a text by their token, in chunks of whole or, for frequent tokens, cut groups.

    ``index`` LongTensor [N] gives the number of the token at every position.
    """

    def __init__(self, index: torch.Tensor, tokens: int) -> None:
        self.index = index
        self.counts = torch.bincount(index, minlength=tokens)
        self._order = torch.argsort(index, stable=True)

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Positions [n], and the place of each one's group among those of the chunk."""
        for positions in self._order.split(_CHUNK):
            _, group = torch.unique_consecutive(self.index[positions], return_inverse=True)
            yield positions, group


def activations(dense: SwiGLU, x: torch.Tensor) -> torch.Tensor:
    """What the neurons of a SwiGLU hand to its output matrix: [n, D] -> [n, K]."""
    return torch.nn.functional.silu(dense.gate_proj(x)) * dense.up_proj(x)


def split_neurons(
    dense: SwiGLU, width: int, x: torch.Tensor, wanted: torch.Tensor, groups: TokenGroups
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` neurons to keep, LongTensor [S], and their output weights [S, D].

    ``x`` [N, D] is what the dense network reads, ``wanted`` [N, D] what is to come out.
    """
    neurons = dense.gate_proj.out_features
    moment = x.new_zeros(neurons, neurons, dtype=torch.float64)
    cross = x.new_zeros(neurons, wanted.shape[1], dtype=torch.float64)
    for positions, group in groups.chunks():
        inside = _within(activations(dense, x[positions]), group)
        moment += (inside.T @ inside).double()
        cross += (inside.T @ _within(wanted[positions], group)).double()
    ridge = _RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    moment.diagonal().add_(ridge)
    cross += ridge * dense.down_proj.weight.T.double()
    kept = _eliminate(moment, cross, width)
    weights = torch.linalg.solve(moment[kept][:, kept], cross[kept])
    return kept, weights.to(x.dtype)


def _eliminate(moment: torch.Tensor, cross: torch.Tensor, width: int) -> torch.Tensor:
    """Drop neurons, those first whose loss the others make up for best, until ``width`` are left.

    Without neuron k the squared error grows by ``|w_k|^2 / inverse_kk``, the other weights refit.
    """
    left = torch.arange(len(moment), device=moment.device)
    inverse = torch.linalg.inv(moment)
    weights = inverse @ cross
    step = -(-max(0, len(left) - width) // _ROUNDS)
    while len(left) > width:
        cost = weights.square().sum(dim=1) / inverse.diagonal()
        order = torch.argsort(cost, stable=True)
        cut = min(step, len(left) - width)
        out, keep = order[:cut], order[cut:].sort().values
        passed_on = torch.linalg.solve(inverse[out][:, out], inverse[out])
        weights = (weights - passed_on.T @ weights[out])[keep]
        inverse = (inverse - inverse[:, out] @ passed_on)[keep][:, keep]
        left = left[keep]
    return left


def _within(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """``values`` [n, D] less the mean of their group; groups are numbered in order."""
    counts = torch.bincount(group).unsqueeze(1)
    means = values.new_zeros(len(counts), values.shape[1]).index_add_(0, group, values) / counts
    return values - means[group]
