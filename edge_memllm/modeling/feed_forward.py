"""Feed-forward networks without biases: the SwiGLU of FFN-M and FFN-C, and FFN-C's linear form."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from edge_memllm.modeling.configuration import MemoryLLMConfig


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases (paper, eq. 2.3)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LinearCompute(nn.Module):
    """FFN-C read literally as "a linear dense module": one ``h x h`` matrix, or two."""

    def __init__(self, hidden_size: int, width: int, beta: int) -> None:
        super().__init__()
        shapes = [(hidden_size, width), (width, hidden_size)][: min(beta, 2)]
        self.projections = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        for projection in self.projections:
            x = projection(x)
        return x


def build_compute(config: MemoryLLMConfig) -> SwiGLU | LinearCompute:
    """The FFN-C of one layer, in the form the configuration names."""
    if config.compute_form == "linear":
        return LinearCompute(config.hidden_size, config.intermediate_size, config.beta)
    return SwiGLU(config.hidden_size, config.intermediate_size)
