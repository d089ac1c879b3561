"""The graph of a network without its table: distinct tokens' rows in, logits out.

One block, beta between 1 and 7, sequential placement (`+norm` is SkipSimplifiedLayerNormalization:
it adds, normalises, and gives both; so a sum always waits for the norm that follows it):

    x_l --------+norm--> input_layernorm --> attention --+
    pending ----'  |                                     |
                   x ---------------------------------+norm--> post_attention_layernorm --> FFN-C
                                                         |                                    |
                          M_l (gain applied) --> Add --- h                                    |
                                                  |                                           |
                                             x_{l+1}                                    pending

Beta 0 has no FFN-C: the attention output itself is pending. Beta 8 has no M_l. In the parallel
placement FFN-C reads ``x``, its output joins ``x`` with M_l, and the attention output is pending.
Nothing here knows files of checkpoints or torch: weights arrive as arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_memllm.codecs import Codec
from edge_memllm_export.graph.blocks import (
    AttentionInputs,
    AttentionShape,
    AttentionWeights,
    KVScales,
    attention,
    linear_compute,
    rotary_inputs,
    swiglu,
)
from edge_memllm_export.graph.ops import DATA_TYPES, GraphTape
from edge_memllm_export.graph.tokens import (
    MemoryShape,
    TokenInputs,
    layer_memory,
    token_inputs,
)
from edge_memllm_export.weights.quantizer import QuantizeMatrix
from edge_memllm_export.weights.quantizer import quantize as round_to_nearest

OPSET = 23
GRAPH_FILE = "graph.onnx"
EXTERNAL_FILE = "graph.onnx.data"
_IR_VERSION = 11  # the version that came with opset 23
# Weights in a file of their own are mapped into memory, so that the copy the runtime packs for
# itself is the only one: 0.3 GB less for a graph of that size. Small graphs stay in one file.
_SELF_CONTAINED_BYTES = 16 << 20

ReadWeight = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class GraphForm:
    """How numbers are stored and computed: the export's choices, not the network's."""

    weights: str  # a key of matrix_forms.WEIGHT_FORMS
    codec: Codec
    embedding_dtype: str  # "float16" | "float32", that of the table's records
    block: int | None = None  # weights to a scale in a matrix; None chooses by its size
    int8_cache: bool = False  # keys and values; else they are in the compute dtype
    matrices: Mapping[str, str] = field(default_factory=dict)  # kinds in another form than weights
    method: str | None = None  # one of matrix_forms.METHODS; None where nothing is quantised


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every position, float32 [P, head_dim/2]."""

    cosine: np.ndarray
    sine: np.ndarray


@dataclass
class _Stream:
    """The residual stream between two blocks: ``x + pending``, not yet added."""

    x: ir.Value
    pending: ir.Value | None


def build_graph(
    config: Any,
    read: ReadWeight,
    rotary: Rotary,
    form: GraphForm,
    identity: str,
    kv_scales: Sequence[KVScales] | None = None,
    quantize: QuantizeMatrix = round_to_nearest,
) -> ir.Model:
    """The graph of the network that ``config`` (a MemoryLLMConfig) describes.

    ``read`` gives a weight by its name in the checkpoint. ``kv_scales``, one per layer, are for
    keys and values in int8; ``quantize`` is called layer by layer, the head last. Inputs and
    outputs are listed in docs/format.md. Raises ExportError for weights that the form cannot hold.
    """
    tape = GraphTape(form.weights, form.matrices, form.block, quantize, config.rms_norm_eps)
    shape = AttentionShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    memory = MemoryShape(config.num_hidden_layers, config.memory_layers, config.hidden_size)
    tokens = token_inputs(tape, memory, form.codec, form.embedding_dtype)
    logits_index = ir.val("logits_index", dtype=DATA_TYPES["int64"], shape=["B", "K"])
    seqlens_k = ir.val("seqlens_k", dtype=DATA_TYPES["int32"], shape=["B"])
    total = ir.val("total_sequence_length", dtype=DATA_TYPES["int32"], shape=[])
    caches = rotary_inputs(tape, shape, rotary.cosine, rotary.sine)
    shared = AttentionInputs(seqlens_k, total, *caches)
    inputs = [*tokens.inputs, logits_index, seqlens_k, total]
    outputs: list[ir.Value] = []
    stream = _Stream(tokens.embedding, None)
    for layer in range(config.num_hidden_layers):
        past = _cache_inputs("int8" if form.int8_cache else tape.compute_dtype, layer, shape)
        scales = kv_scales[layer] if kv_scales else None
        block = _Block(tape, config, read, layer)
        stream, present = block.record(stream, tokens, shape, shared, past, scales)
        inputs += past
        outputs += present
    logits = _head(tape, read, config, stream, logits_index)
    graph = tape.graph(inputs, [logits, *outputs], OPSET)
    model = ir.Model(graph, ir_version=_IR_VERSION, producer_name="edge-memllm")
    model.metadata_props["edge_memllm.format_version"] = "1"
    model.metadata_props["edge_memllm.identity"] = identity
    return model


def save_graph(
    model: ir.Model, folder: Path, self_contained_bytes: int = _SELF_CONTAINED_BYTES
) -> list[str]:
    """Write ``graph.onnx`` into the folder; weights beyond 16 MB go to one file beside it.

    Returns the names of the files written.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size <= self_contained_bytes:
        ir.save(model, folder / GRAPH_FILE)
        return [GRAPH_FILE]
    ir.save(model, folder / GRAPH_FILE, external_data=EXTERNAL_FILE, alignment=4096)
    return [GRAPH_FILE, EXTERNAL_FILE]


class _Block:
    """Recording of one layer; the drawing at the top of this file."""

    def __init__(self, tape: GraphTape, config: Any, read: ReadWeight, layer: int) -> None:
        self._tape = tape
        self._config = config
        self._read = read
        self._layer = layer
        self._path = f"/model/layers.{layer}"

    def record(
        self,
        stream: _Stream,
        tokens: TokenInputs,
        shape: AttentionShape,
        shared: AttentionInputs,
        past: tuple[ir.Value, ir.Value],
        kv_scales: KVScales | None,
    ) -> tuple[_Stream, list[ir.Value]]:
        normed, x = self._norm("input_layernorm", stream.x, stream.pending)
        attended, present = attention(
            self._tape,
            f"{self._path}/self_attn",
            normed,
            self._attention_weights(),
            shape,
            shared,
            past,
            (f"present.{self._layer}.key", f"present.{self._layer}.value"),
            kv_scales,
        )
        out = self._feed_forward(x, attended)
        if tokens.memory is not None:
            memory = layer_memory(self._tape, tokens.memory, self._layer)
            out.x = self._tape.op(f"{self._path}/memory/Add", "Add", [out.x, memory])
        return out, present

    def _feed_forward(self, x: ir.Value, attended: ir.Value) -> _Stream:
        if self._config.beta == 0:
            return _Stream(x, attended)
        if self._config.compute_placement == "parallel":
            normed, _ = self._norm("post_attention_layernorm", x, None)
            joined = self._tape.op(f"{self._path}/mlp/Add", "Add", [x, self._compute(normed)])
            return _Stream(joined, attended)
        normed, h = self._norm("post_attention_layernorm", x, attended)
        return _Stream(h, self._compute(normed))

    def _compute(self, x: ir.Value) -> ir.Value:
        path = f"{self._path}/mlp"
        if self._config.compute_form == "linear":
            count = 1 if self._config.beta == 1 else 2
            matrices = [self._weight(f"mlp.projections.{i}") for i in range(count)]
            return linear_compute(self._tape, path, x, matrices)
        names = ("gate_proj", "up_proj", "down_proj")
        return swiglu(self._tape, path, x, {name: self._weight(f"mlp.{name}") for name in names})

    def _norm(self, name: str, x: ir.Value, pending: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """RMSNorm of ``x + pending``, and that sum."""
        weight = self._weight(name)
        if pending is None:
            return self._tape.norm(f"{self._path}/{name}", x, weight), x
        return self._tape.add_norm(f"{self._path}/{name}", x, pending, weight)

    def _attention_weights(self) -> AttentionWeights:
        def read(names: Sequence[str], part: str = "weight") -> dict[str, np.ndarray]:
            return {name: self._weight(f"self_attn.{name}", part) for name in names}

        queries = ("q_proj", "k_proj", "v_proj")
        return AttentionWeights(
            read((*queries, "o_proj")),
            read(queries, "bias") if self._config.attention_bias else None,
            read(("q_norm", "k_norm")) if self._config.qk_norm else None,
        )

    def _weight(self, name: str, part: str = "weight") -> np.ndarray:
        return self._read(f"model.layers.{self._layer}.{name}.{part}")


def _cache_inputs(dtype: str, layer: int, shape: AttentionShape) -> tuple[ir.Value, ir.Value]:
    dims: list[str | int] = ["B", shape.kv_heads, "C", shape.graph_head_dim]
    key, value = (
        ir.val(f"past_key_values.{layer}.{part}", dtype=DATA_TYPES[dtype], shape=dims)
        for part in ("key", "value")
    )
    return key, value


def _head(
    tape: GraphTape, read: ReadWeight, config: Any, stream: _Stream, logits_index: ir.Value
) -> ir.Value:
    """Logits [B,K,V]; only the positions asked for reach the last norm and the head."""
    axis = tape.constant("model.positions.axis", np.array([-1]))
    positions = tape.op(
        "/model/positions/Unsqueeze", "Unsqueeze", [logits_index, axis], dtype="int64"
    )
    x, pending = (
        tape.op(
            f"/model/positions/{name}/GatherND", "GatherND", [value, positions], {"batch_dims": 1}
        )
        for name, value in (("x", stream.x), ("pending", stream.pending))
    )
    normed, _ = tape.add_norm("/model/norm", x, pending, read("model.norm.weight"))
    tied = config.tie_word_embeddings
    head = read("model.embed_tokens.weight" if tied else "lm_head.weight")
    logits = tape.linear("/lm_head", normed, head)
    logits.name = "logits"
    return logits
