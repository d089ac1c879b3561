"""Next-token loss: cross-entropy plus the z-loss of the paper's recipe (Table 3)."""

from __future__ import annotations

from typing import Any

import torch

_ROWS = 256  # positions per stretch: its float32 logits stay in the cache of a CPU core


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """Mean over positions of ``-log p(label) + z_loss * log(Z)^2``, in float32.

    ``logits`` [B, T, V] and ``labels`` [B, T] at the same positions: labels are shifted here,
    and the last logit of each sequence has nothing to predict.
    """
    kept = logits[:, :-1].flatten(0, 1)
    return _CrossEntropy.apply(kept, labels[:, 1:].flatten(), z_loss)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass over stretches of positions.

    The plain form keeps several [B * T, V] float32 arrays for the backward pass; this one keeps
    the gradient alone, in the dtype of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, z_loss: float
    ) -> torch.Tensor:
        count = len(target)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits)
        for start in range(0, count, _ROWS):
            rows = slice(start, start + _ROWS)
            stretch, label = logits[rows].float(), target[rows].unsqueeze(-1)
            log_z = torch.logsumexp(stretch, dim=-1, keepdim=True)
            total += (log_z - stretch.gather(-1, label) + z_loss * log_z.square()).sum()
            # d/dx = softmax(x) * (1 + 2 z log Z) - onehot
            stretch = stretch.sub_(log_z).exp_().mul_(1 + 2 * z_loss * log_z)
            stretch.scatter_add_(-1, label, torch.full_like(log_z, -1.0))
            gradient[rows] = stretch.div_(count)
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * grad_outputs[0], None, None
