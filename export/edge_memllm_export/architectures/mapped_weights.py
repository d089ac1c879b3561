"""Weights that stay in their file: arrays and blocks over them, networks that convert them in use.

A matrix in another dtype than is computed in is converted for one product and forgotten, so that
memory stays that of the largest one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional

from edge_memllm.arrays import Floats
from edge_memllm_export.architectures.architecture import Folding, Side
from edge_memllm_export.graph.attention import AttentionShape, AttentionWeights, widen_heads
from edge_memllm_export.graph.builder import GraphBuilder

_CONVERTED_WEIGHTS = 1 << 26  # of a matrix that are alive in another dtype: a head has many more
_QUERIES = ("q_proj", "k_proj", "v_proj")
_PARTS = {"qkv_proj": _QUERIES, "gate_up_proj": ("gate_proj", "up_proj")}
HEAD, TIED_HEAD = "lm_head.weight", "model.embed_tokens.weight"


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
    delicate_kinds: tuple[str, ...] = ()
    context: int  # positions that a text may have
    feed_forward_norm = "post_attention_layernorm"  # before the feed-forward network
    row_table: str | None = None
    _scaled: Mapping[str, _Scales] = {}

    def heads(self, layer: int) -> AttentionShape:
        """Return the heads of a layer."""
        raise NotImplementedError

    def limited(self, context: int) -> Self:
        """Return the same network for texts of at most so many positions."""
        found = copy(self)
        found.context = context
        return found

    def add_norm(
        self, graph: GraphBuilder, path: str, x: ir.Value, pending: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Return the norm at `path` of x + pending, and that sum; see `GraphBuilder.add_norm`."""
        weight = self.array(f"{path[1:].replace('/', '.')}.weight")
        return graph.add_norm(path, x, pending, weight, self.epsilon)

    def attention_weights(self, path: str) -> AttentionWeights:
        """Return what attention at `path` multiplies by."""
        normed = f"{path}.q_norm.weight" in self.weights
        queries = [name for name in _QUERIES if f"{path}.{name}.weight" in self.weights]
        return AttentionWeights(
            self.arrays(path, (*queries, "o_proj")),
            self.biases(path, _QUERIES),
            self.arrays(path, ("q_norm", "k_norm")) if normed else None,
            self.epsilon,
        )

    def biases(self, path: str, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """Return the biases of modules below `path`, which all have one or none does."""
        biased = f"{path}.{names[0]}.bias" in self.weights
        return self.arrays(path, names, "bias") if biased else None

    def parts(self, matrix: str) -> tuple[str, ...]:
        """Return the weights that make up a matrix of the graph; see `Architecture`."""
        if matrix == HEAD:
            return (HEAD if HEAD in self.weights else TIED_HEAD,)
        path, kind, weight = matrix.rsplit(".", 2)
        parts = (f"{path}.{part}.{weight}" for part in _PARTS.get(kind, (kind,)))
        return tuple(part for part in parts if part in self.weights)

    def arranged(self, matrix: str, values: np.ndarray, side: Side) -> np.ndarray:
        """Return values of rows or columns with zeros for wider heads; see `Architecture`."""
        path, kind = _place(matrix)
        if (kind, side) not in (("qkv_proj", "rows"), ("q_proj", "rows"), ("o_proj", "columns")):
            return values
        return widen_heads(values, self.heads(_layer(path)))

    def folding(self, matrix: str) -> Folding | None:
        """Return where factors of a matrix's columns can cancel; see `Architecture`."""
        path, kind = _place(matrix)
        layer = path.rsplit(".", 1)[0]
        if kind == "o_proj":
            shape = self.heads(_layer(path))
            if shape.graph_head_dim != shape.head_dim:
                return None
            shared = shape.heads // shape.kv_heads
            return Folding(self._present(f"{path}.v_proj"), shared, shape.head_dim)
        if kind == "down_proj":
            return Folding(self._present(f"{path}.up_proj"))
        norms = dict.fromkeys(("qkv_proj", "q_proj"), "input_layernorm")
        norms["gate_up_proj"] = self.feed_forward_norm
        norm = "model.norm" if matrix == HEAD else f"{layer}.{norms[kind]}"
        return Folding((f"{norm}.weight",))

    def folded(self, factors: Mapping[str, Floats]) -> Self:
        """Return the same network with these factors of columns; see `Architecture`."""
        rows: dict[str, Floats] = {}
        columns: dict[str, Floats] = {}
        for matrix, each in factors.items():
            folding = self.folding(matrix)
            assert folding is not None  # who gives factors has asked
            columns |= dict.fromkeys(self.parts(matrix), each)
            # Of heads that read the same rows the first says it for all.
            once = each.reshape(-1, folding.shared, folding.width)[:, 0].reshape(-1)
            rows |= dict.fromkeys(folding.divided, np.float32(1) / once)
        found = copy(self)
        found._scaled = {
            name: _Scales(rows.get(name), columns.get(name)) for name in rows | columns
        }
        return found

    def arrays(
        self, path: str, names: Sequence[str], part: str = "weight"
    ) -> dict[str, np.ndarray]:
        """Return the weights, or biases, of modules below `path` by the modules' names."""
        return {name: self.array(f"{path}.{name}.{part}") for name in names}

    def array(self, name: str) -> np.ndarray:
        """Return one weight as the graph has it, with the factors that were folded into it."""
        array = self.plain_array(name)
        return self._scaled[name].times(array) if name in self._scaled else array

    def plain_array(self, name: str) -> np.ndarray:
        """Return one weight before anything is folded: a view, unless a family changes some."""
        return weight_array(self.weights[name])

    def _present(self, module: str) -> tuple[str, ...]:
        names = (f"{module}.weight", f"{module}.bias")
        return tuple(name for name in names if name in self.weights)


@dataclass(frozen=True)
class _Scales:
    """Factors of the rows and of the columns of a weight."""

    rows: Floats | None
    columns: Floats | None

    def times(self, weight: np.ndarray) -> Floats:
        found: Floats = weight.astype(np.float32)
        if self.rows is not None:
            found *= self.rows.reshape(-1, *[1] * (found.ndim - 1))
        if self.columns is not None:
            found *= self.columns
        return found


def _place(matrix: str) -> tuple[str, str]:
    """Path and kind of a matrix: model.layers.3.mlp and down_proj."""
    path, _, kind = matrix.removesuffix(".weight").rpartition(".")
    return path, kind


def _layer(path: str) -> int:
    return int(path.split(".")[2])  # model.layers.3.self_attn


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
        x, bias = x.to(dtype), None if self.bias is None else self.bias.to(dtype)
        rows = max(1, _CONVERTED_WEIGHTS // self.in_features)
        if self.weight.dtype == dtype or self.out_features <= rows:
            return functional.linear(x, self.weight.to(dtype), bias)
        found = torch.cat([functional.linear(x, w.to(dtype)) for w in self.weight.split(rows)], -1)
        return found if bias is None else found + bias


class ReadEmbedding(nn.Module):
    """An embedding as `FloatEmbedding`, whose rows are read wherever they are asked for."""

    def __init__(self, read: Callable[[int, int], torch.Tensor], factor: float) -> None:
        """Take what reads rows, from the first to before the second."""
        super().__init__()
        self._read = read
        self._factor = factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids [...]: [..., D]."""
        distinct, index = torch.unique(ids.cpu(), return_inverse=True)
        ends = (distinct.diff() != 1).nonzero().flatten() + 1
        runs = distinct.tensor_split(ends)
        rows = torch.cat([self._read(int(run[0]), int(run[-1]) + 1) for run in runs])
        return (rows.float() * self._factor)[index].to(ids.device)


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
