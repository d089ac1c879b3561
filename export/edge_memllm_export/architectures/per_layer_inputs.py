"""What Gemma 3n and Gemma 4 share: per-layer inputs, keys and values read twice, a capped head.

A token has a row r_l in a table of its own, beside its embedding x_0, for each layer l:

    in_l = (RMSNorm(W_proj x_0 * D^-1/2)_l + r_l) / sqrt(2)
    g_l  = RMSNorm(W_u (gelu(W_g x) * in_l)) * gain_l           (gain: ours, 1 in the checkpoint)

The norm after W_u takes back the root of 2, so it goes into that norm's epsilon. A gain on the row
would only weigh it against the projection, up to a ceiling; so the gain stands behind the norm. The
last layers read keys and values of others: nothing they compute is kept, so they see the wanted
positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers import DynamicCache

from edge_memllm.arrays import Floats, Ids
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.modeling import TokenRows
from edge_memllm.modeling.rows import default_chunk
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.source import Rows
from edge_memllm_export.architectures.architecture import Folding, StoredKV
from edge_memllm_export.architectures.dense import Dense, RotaryKind, refuse_rotary
from edge_memllm_export.architectures.dense_reference import (
    DenseReference,
    EmbeddingRows,
    FedNetwork,
)
from edge_memllm_export.architectures.mapped_weights import FloatEmbedding, ReadEmbedding
from edge_memllm_export.architectures.multimodal import MultimodalText
from edge_memllm_export.graph.attention import AttentionShape, AttentionWeights
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.feed_forward import gated
from edge_memllm_export.graph.step import StepInputs
from edge_memllm_export.graph.tokens import gained_weights, layer_memory, layer_weights
from edge_memllm_runtimes.torch_reference import TorchReference

_ROWS = "model.embed_tokens_per_layer.weight"
_PROJECTION = "per_layer_model_projection"
_OF_LAYER = ("per_layer_input_gate", "per_layer_projection")
_LAYER_TYPES = ("full_attention", "sliding_attention")
# What a checkpoint may carry for layers that read another's keys and values, and nobody uses.
_UNUSED = ("k_proj", "v_proj", "k_norm", "v_norm")


@dataclass(frozen=True)
class LayerInputs:
    """What rows bring to all layers."""

    rows: ir.Value  # in_l times the root of 2, float32 [B,T,L,P]
    norms: ir.Value  # weights of the norms behind W_u, gains applied, [L,D]


class PerLayerInputs(MultimodalText, Dense):
    """The part of an `Architecture` that both families have."""

    own_facts: ClassVar[tuple[str, ...]] = (
        "final_logit_softcapping",
        "hidden_activation",
        "hidden_size_per_layer_input",
        "layer_types",
        "num_kv_shared_layers",
    )
    feed_forward_norm = "pre_feedforward_layernorm"
    part_of_rows: ClassVar[float] = 1.0  # that the graph computes with: a norm takes it back

    def refuse(self, config: Any) -> None:
        """Name, in a ValueError, what the network computes and the graph would not."""
        if config.hidden_activation != "gelu_pytorch_tanh":
            raise ValueError(
                f"hidden_activation is {config.hidden_activation!r}, expected 'gelu_pytorch_tanh'."
            )
        if getattr(config, "attention_bias", False):
            raise ValueError("attention_bias is true, expected projections without biases.")
        for kind in config.layer_types:
            if kind not in _LAYER_TYPES:
                raise ValueError(f"layer type {kind!r}, expected {' or '.join(_LAYER_TYPES)}.")
            self.refuse_angles(config.rope_parameters[kind])

    def refuse_angles(self, rope: Mapping[str, Any]) -> None:
        """Name, in a ValueError, angles that are no table by position."""
        refuse_rotary(rope)

    def text_name(self, stored: str) -> str | None:
        """Return what the text's network calls a stored weight; None for one that nobody reads."""
        name = super().text_name(stored)
        if name is None or ".self_attn." not in name:
            return name
        _, place, _, module, *_ = name.removeprefix("model.").split(".")
        shared = place.isdecimal() and self.source(int(place)) is not None
        return None if shared and module in _UNUSED else name

    def rotary_kinds(self) -> tuple[RotaryKind, ...]:
        """Return the types of the layers, each of which has its angles."""
        return tuple((kind,) for kind in self.config.layer_types)

    def attention_shapes(self) -> tuple[AttentionShape, ...]:
        """Return the heads of each layer; scores are not scaled."""
        config = self.config
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return tuple(AttentionShape(*heads, self.window(k), 1.0) for k in config.layer_types)

    def source(self, layer: int) -> int | None:
        """Return the layer whose keys and values a layer reads; None for its own."""
        kinds = self.config.layer_types
        own = self.own_layers
        if layer < own:
            return None
        return max(each for each in range(own) if kinds[each] == kinds[layer])

    @property
    def own_layers(self) -> int:
        """How many layers have keys and values of their own: the first ones."""
        return int(self.config.num_hidden_layers - self.config.num_kv_shared_layers)

    def memory(self) -> MemorySpec:
        """Return the rows of a token, where the checkpoint has them."""
        layers, width = self.config.num_hidden_layers, self.config.hidden_size_per_layer_input
        return MemorySpec(layers, width, "gate", (1.0,) * layers) if width else MemorySpec()

    def makes_rows(self, weight: str) -> bool:
        """Whether a weight does nothing but make memory rows."""
        return weight == _ROWS

    @property
    def row_table(self) -> str | None:  # type: ignore[override]
        """The weight that is the rows, but for their factor."""
        return _ROWS if self.config.hidden_size_per_layer_input else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names that the graph gives its matrices, as they lie in it."""
        attention = ("qkv_proj", "q_proj") if self.config.num_kv_shared_layers else ("qkv_proj",)
        return (*attention, "o_proj", "gate_up_proj", "down_proj", *self.delicate_kinds, "lm_head")

    @property
    def delicate_kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """The matrices around the rows: few weights, on which everything of a row depends.

        At 4.3 bits instead of 8 they double the divergence
        (https://github.com/turboderp-org/exllamav3/pull/253).
        """
        rows = self.config.hidden_size_per_layer_input
        return (_PROJECTION, *_OF_LAYER) if rows else ()

    def folding(self, matrix: str) -> Folding | None:
        """Return where factors of a matrix's columns can cancel; see `Architecture`."""
        kind = matrix.removesuffix(".weight").rpartition(".")[2]
        # What o_proj reads comes out of normed values, what the others read is the sum or a gate.
        return None if kind in ("o_proj", *self.delicate_kinds) else super().folding(matrix)

    def attention_weights(self, path: str) -> AttentionWeights:
        """Return what attention at `path` multiplies by; values are normed without a weight."""
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        there = [name for name in projections if f"{path}.{name}.weight" in self.weights]
        norms = [name for name in ("q_norm", "k_norm") if f"{path}.{name}.weight" in self.weights]
        normed = self.arrays(path, norms)
        if "k_norm" in normed:
            normed["v_norm"] = np.ones_like(normed["k_norm"], np.float32)
        return AttentionWeights(self.arrays(path, there), None, normed, self.epsilon)

    def layer_inputs(self, graph: GraphBuilder, step: StepInputs) -> LayerInputs | None:
        """Return what rows bring to all layers; None without rows."""
        if step.tokens.memory is None:
            return None
        memory, path = self.memory(), f"/model/{_PROJECTION}"
        weight = self.array(f"model.{_PROJECTION}.weight")
        x = graph.linear(path, step.tokens.embedding, weight)
        shape = graph.constant(
            f"model.{_PROJECTION}.shape", np.array([0, 0, memory.layers, memory.width])
        )
        x = graph.op(f"{path}/Reshape", "Reshape", [x, shape])
        # The norm takes back the factor D^-1/2, but for its epsilon.
        epsilon = self.epsilon * self.config.hidden_size
        norm = self.array("model.per_layer_projection_norm.weight")
        x = graph.norm("/model/per_layer_projection_norm", x, norm, epsilon)
        both = (
            graph.cast(f"{path}/{name}", value, "float32")
            for name, value in (("projected", x), ("rows", step.tokens.memory))
        )
        rows = graph.op(f"{path}/Add", "Add", list(both), dtype="float32")
        return LayerInputs(rows, self._gained_norms(graph, step))

    def _gained_norms(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        names = range(self.config.num_hidden_layers)
        norms = [
            self.array(f"model.layers.{layer}.post_per_layer_input_norm.weight") for layer in names
        ]
        assert step.tokens.gain is not None  # there are rows
        return gained_weights(graph, step.tokens.gain, np.stack(norms))

    def gated(self, graph: GraphBuilder, layer: int, x: ir.Value, inputs: LayerInputs) -> ir.Value:
        """Return what a layer's row adds to the sum, out of ``x`` [B,T,D]."""
        path, name = f"/model/layers.{layer}", f"model.layers.{layer}"
        row = layer_memory(graph, inputs.rows, layer, "float32")
        product = gated(graph, f"{path}/{_OF_LAYER[0]}", self.opened(graph, layer, x), row)
        up = self.array(f"{name}.{_OF_LAYER[1]}.weight")
        added = graph.linear(f"{path}/{_OF_LAYER[1]}", product, up)
        norm, epsilon = layer_weights(graph, inputs.norms, layer), 2 * self.epsilon
        path = f"{path}/post_per_layer_input_norm"
        return graph.norm_by(path, added, norm, epsilon * self.part_of_rows**2)

    def opened(self, graph: GraphBuilder, layer: int, x: ir.Value) -> ir.Value:
        """Return W_g x, float32 [B,T,P]."""
        path = f"/model/layers.{layer}/{_OF_LAYER[0]}"
        gate = self.array(f"model.layers.{layer}.{_OF_LAYER[0]}.weight")
        return graph.cast(path, graph.linear(path, x, gate), "float32")

    def logits(self, graph: GraphBuilder, normed: ir.Value) -> ir.Value:
        """Return c tanh(z / c) of the head's z, where there is a cap c."""
        found, cap = super().logits(graph, normed), self.config.final_logit_softcapping
        if cap is None:
            return found
        path = "/lm_head/softcap"
        inverse, factor = (
            graph.vector(f"lm_head.softcap.{name}", np.array([value], np.float32))
            for name, value in (("inverse", 1 / cap), ("cap", cap))
        )
        found = graph.op(f"{path}/Mul", "Mul", [found, inverse])
        found = graph.op(f"{path}/Tanh", "Tanh", [found])
        return graph.op(f"{path}/Mul_1", "Mul", [found, factor])

    def complete(self, network: Any) -> None:
        """Make again what is no weight: angles, and the factors of the embeddings.

        These are roots, rounded to the dtype that the checkpoint stores embeddings in.
        """
        super().complete(network)
        model, config = network.model, self.config
        factor = _root(config.hidden_size, model.embed_tokens.weight.dtype)
        model.embed_tokens = FloatEmbedding(model.embed_tokens, factor)
        if self.row_table is not None:
            factor = _root(config.hidden_size_per_layer_input, self.weights[_ROWS].dtype)
            model.embed_tokens_per_layer = (
                ReadEmbedding(partial(self.read_rows, _ROWS), factor)
                if self.weights[_ROWS].is_meta
                else FloatEmbedding(model.embed_tokens_per_layer, factor)
            )

    def judge(self, network: Any) -> DenseReference:
        """Return the frozen network as a judge."""
        own = [self.source(layer) is None for layer in range(self.config.num_hidden_layers)]
        return PerLayerReference(network, self.shapes, self.parts, self.memory(), own)


def _root(width: int, dtype: torch.dtype) -> float:
    """The root of a width as a number of this dtype."""
    return torch.tensor(width**0.5).to(dtype).item()


class PerLayerReference(DenseReference):
    """A network with per-layer inputs as a judge; see `Reference`."""

    def __init__(
        self,
        network: Any,
        shapes: Sequence[AttentionShape],
        parts: Callable[[str], tuple[str, ...]],
        memory: MemorySpec,
        own: Sequence[bool],
    ) -> None:
        """Take the frozen network; `own` says which layers have keys and values of their own."""
        super().__init__(network, shapes, parts, heads_first=False)
        self._memory = memory
        self._own = own

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, V] of what the last norm gives [N, D], capped."""
        logits, cap = super().head(hidden), self.network.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def rows(self, chunk: int | None = None) -> Rows:
        """Embeddings and rows of tokens, slices of two tables."""
        if not self._memory.layers:
            return super().rows(chunk)
        return PerLayerRows(self.network.model, self._memory, chunk)

    def fed_logits(self, ids: Sequence[int], embedding: Floats, rows: Floats) -> Floats:
        """Logits [T, V] out of embeddings [U, D] and rows [U, L, P] of the distinct ids, sorted."""
        if not self._memory.layers:
            return super().fed_logits(ids, embedding, rows)
        index = np.unique(np.asarray(ids), return_inverse=True)[1]
        fed, gates = (
            torch.from_numpy(each[index][None]).to(self.network.device)
            for each in (embedding, rows)
        )
        with torch.inference_mode():
            output = self.network(inputs_embeds=fed, per_layer_inputs=gates, use_cache=False)
        logits: Floats = output.logits[0].float().cpu().numpy()
        return logits

    def runtime(self) -> Runtime:
        """The network behind the contract of runtimes."""
        if not self._memory.layers:
            return super().runtime()
        return TorchReference(GatedNetwork(self.network, self._shapes, self._own))

    def stored(self) -> Sequence[StoredKV]:
        """What each cache stores, in the order of the layers that have one."""
        layers = zip(self.network.model.layers, self._shapes, self._own, strict=True)
        return [
            StoredKV(layer.self_attn.k_norm, layer.self_attn.v_norm, shape.kv_heads)
            for layer, shape, own in layers
            if own
        ]


class PerLayerRows(EmbeddingRows):
    """Embeddings and rows of tokens as a table stores them; see `edge_memllm.table.source.Rows`."""

    def __init__(self, model: Any, memory: MemorySpec, chunk: int | None) -> None:
        """Take how many tokens go at a time; None takes as many as have 128 MiB at most."""
        super().__init__(model.embed_tokens, chunk or default_chunk(memory.layers, memory.width))
        self._rows, self._count = (
            model.embed_tokens_per_layer,
            model.config.vocab_size_per_layer_input,
        )
        self._shape = memory.layers, memory.width

    def rows(self, ids: Ids) -> Floats:
        """Return the rows [U, L, P] of tokens; those beyond the table have its first."""
        known = torch.from_numpy(np.where(ids < self._count, ids, 0))
        found: Floats = self._rows(known.to(self._embedding.weight.device)).cpu().numpy()
        return found.reshape(len(ids), *self._shape)


class GatedNetwork(FedNetwork):
    """The network as a `RowNetwork`, which is fed embeddings and rows."""

    def __init__(self, network: Any, shapes: Sequence[AttentionShape], own: Sequence[bool]) -> None:
        super().__init__(network, [shape for shape, mine in zip(shapes, own, strict=True) if mine])

    def fed(self, token_rows: TokenRows) -> dict[str, torch.Tensor]:
        """Return the rows of every position besides its embedding."""
        rows = token_rows.memory[token_rows.index]
        return super().fed(token_rows) | {"per_layer_inputs": rows}

    def __call__(
        self,
        *,
        token_rows: TokenRows,
        memory_gain: torch.Tensor | None,
        cache: DynamicCache,
        use_cache: bool,
        logits_to_keep: torch.Tensor,
    ) -> Any:
        """Return logits [B, K, V] of the positions to keep."""
        norms = [layer.post_per_layer_input_norm for layer in self._network.model.layers]
        with _gained(norms, memory_gain):
            return super().__call__(
                token_rows=token_rows,
                memory_gain=None,
                cache=cache,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
            )


@contextmanager
def _gained(norms: Sequence[nn.Module], gain: torch.Tensor | None) -> Iterator[None]:
    """Multiply the outputs of norms by gains [L]."""
    hooks = [
        norm.register_forward_hook(lambda _, __, output, factor=factor: output * factor)
        for norm, factor in zip(norms, [] if gain is None else gain.tolist(), strict=False)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
