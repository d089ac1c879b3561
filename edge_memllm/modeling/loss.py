"""Next-token loss: cross-entropy plus the z-loss of the paper's recipe (Table 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_ROWS = 256  # positions per stretch: its float32 logits stay in the cache of a CPU core
_NOTHING = -1  # the target of a sequence's last position


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """Mean over positions of ``-log p(label) + z_loss * log(Z)^2``, in float32.

    ``logits`` [B, T, V] and ``labels`` [B, T] at the same positions: labels are shifted here,
    and the last logit of each sequence has nothing to predict. One backward pass only.
    """
    # Labels move and logits stay: a shifted copy of the logits would be the largest array here.
    target = functional.pad(labels[:, 1:], (0, 1), value=_NOTHING)
    return _CrossEntropy.apply(logits.flatten(0, 1), target.flatten(), z_loss)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass over stretches of positions.

    The plain form keeps several [B * T, V] float32 arrays for the backward pass; this one keeps
    the gradient alone, in the dtype of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, z_loss: float
    ) -> torch.Tensor:
        counted = (target != _NOTHING).unsqueeze(-1)
        label = target.clamp(min=0).unsqueeze(-1)
        count = counted.sum()
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits)
        for start in range(0, len(target), _ROWS):
            rows = slice(start, start + _ROWS)
            stretch = logits[rows].to(torch.float32, copy=True)  # it is worked on in place
            share = counted[rows] / count
            log_z = torch.logsumexp(stretch, dim=-1, keepdim=True)
            loss = log_z - stretch.gather(-1, label[rows]) + z_loss * log_z.square()
            total += (loss * share).sum()
            # d/dx = softmax(x) * (1 + 2 z log Z) - onehot
            stretch = stretch.sub_(log_z).exp_().mul_(1 + 2 * z_loss * log_z)
            stretch.scatter_add_(-1, label[rows], torch.full_like(log_z, -1.0))
            gradient[rows] = stretch.mul_(share)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0]), None, None
