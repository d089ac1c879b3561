"""Weights that stay in their file: arrays over them, and networks that convert them while used.

A matrix in another dtype than is computed in is converted for one product and forgotten, so that
memory stays that of the largest one.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.nn import functional


def weight_array(weight: torch.Tensor) -> np.ndarray:
    """A view of a weight in the dtype it is stored in, bfloat16 among them."""
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return weight.numpy()


def converting(network: Any, compute_dtype: torch.dtype) -> Any:
    """The network, its matrices computing in ``compute_dtype`` and its embeddings in float32."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _ConvertingLinear(child, compute_dtype))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, _FloatEmbedding(child))
    return network


class _ConvertingLinear(nn.Linear):
    """A linear layer that computes in ``compute_dtype``, whatever its weight is stored in."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # the weights are there already
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.compute_dtype = compute_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class _FloatEmbedding(nn.Module):
    """An embedding whose rows come out as float32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.weight).float()
