"""Weights that stay in their file: arrays and blocks over them, networks that convert them in use.

A matrix in another dtype than is computed in is converted for one product and forgotten, so that
memory stays that of the largest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional

from edge_memllm_export.graph.blocks import AttentionWeights
from edge_memllm_export.graph.builder import GraphBuilder

_QUERIES = ("q_proj", "k_proj", "v_proj")


def weight_array(weight: torch.Tensor) -> np.ndarray:
    """A view of a weight in the dtype it is stored in, bfloat16 among them."""
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return weight.numpy()


class LayerWeights:
    """The weights of layers that are named as Llama's, as the blocks of a graph take them.

    Biases of the projections and norms of queries and keys are there or not, by their names.
    """

    weights: Mapping[str, torch.Tensor]
    epsilon: float  # of every norm

    def add_norm(
        self, graph: GraphBuilder, path: str, x: ir.Value, pending: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Return the norm at `path` of x + pending, and that sum; see `GraphBuilder.add_norm`."""
        weight = self.array(f"{path[1:].replace('/', '.')}.weight")
        return graph.add_norm(path, x, pending, weight, self.epsilon)

    def attention_weights(self, path: str) -> AttentionWeights:
        """Return what attention at `path` multiplies by."""
        normed = f"{path}.q_norm.weight" in self.weights
        return AttentionWeights(
            self.arrays(path, (*_QUERIES, "o_proj")),
            self.biases(path, _QUERIES),
            self.arrays(path, ("q_norm", "k_norm")) if normed else None,
            self.epsilon,
        )

    def biases(self, path: str, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """Return the biases of modules below `path`, which all have one or none does."""
        biased = f"{path}.{names[0]}.bias" in self.weights
        return self.arrays(path, names, "bias") if biased else None

    def arrays(
        self, path: str, names: Sequence[str], part: str = "weight"
    ) -> dict[str, np.ndarray]:
        """Return the weights, or biases, of modules below `path` by the modules' names."""
        return {name: self.array(f"{path}.{name}.{part}") for name in names}

    def array(self, name: str) -> np.ndarray:
        """Return one weight as the graph has it: a view of it, unless a family changes some."""
        return weight_array(self.weights[name])


def converting(network: Any, compute_dtype: torch.dtype) -> Any:
    """The network, its matrices computing in ``compute_dtype`` and its embeddings in float32."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _ConvertingLinear(child, compute_dtype))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, FloatEmbedding(child))
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


class FloatEmbedding(nn.Module):
    """An embedding whose rows come out as float32, times a factor."""

    def __init__(self, embedding: nn.Embedding, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = embedding.weight
        self._factor = factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids [...]: [..., D]."""
        rows = functional.embedding(ids, self.weight).float()
        return rows if self._factor == 1 else rows * self._factor
