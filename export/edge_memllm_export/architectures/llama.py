"""Dense networks of the llama family: Llama (SmolLM, TinyLlama), Mistral, Qwen2 and Qwen3.

They differ in switches alone: biases of queries, keys and values, norms of queries and keys, which
layers look at a window. A layer:

    x_l --------+norm--> input_layernorm --> attention --+
    pending ----'  |                                     |
                   x ---------------------------------+norm--> post_attention_layernorm --> SwiGLU
                                                         |                                    |
                                                      x_{l+1}                              pending

`+norm` is SkipSimplifiedLayerNormalization: it adds, norms, and gives both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from edge_memllm.arrays import Floats, Ids
from edge_memllm.artifact.model_spec import CacheSpec, MemorySpec, ModelSpec
from edge_memllm.modeling import TokenRows
from edge_memllm.modeling.configuration import CACHE
from edge_memllm.modeling.rows import default_chunk
from edge_memllm.modeling.stored_weights import describing
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.source import Rows
from edge_memllm_export.architectures.architecture import (
    Matrix,
    Source,
    Stage,
    StoredKV,
    Weights,
)
from edge_memllm_export.architectures.mapped_weights import LayerWeights, converting
from edge_memllm_export.graph.blocks import (
    Attention,
    AttentionShape,
    Rotary,
    swiglu,
    wanted_positions,
    widen_heads,
)
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.step import StepInputs
from edge_memllm_runtimes.torch_reference import TorchReference

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Those whose angles depend on nothing but the position.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_FACTS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)
_BATCH = 8  # windows in a layer at once


class Llama(LayerWeights):
    """A network of the family; see `Architecture`. Biases and norms show in its weights' names."""

    def __init__(self, source: Source) -> None:
        """Read the source.

        Raises:
            UnusableCheckpointError: No network of the family is like that, or not exactly.
        """
        with describing(source.where, "describes no network that can be exported"):
            fields = dict(source.fields)
            self.config: Any = AutoConfig.for_model(fields.pop("model_type"), **fields)
            _refuse(self.config)
            expected = dict(_empty_network(self.config).named_parameters())
        self.weights: Weights = source.weights(
            expected,
            tied=self.config.tie_word_embeddings,
            described=f"{self.config.model_type}, {self.config.num_hidden_layers} layers",
        )
        self.shapes = _attention_shapes(self.config)
        self.epsilon: float = self.config.rms_norm_eps

    @property
    def fields(self) -> Mapping[str, Any]:
        """The configuration, complete."""
        fields: dict[str, Any] = self.config.to_dict()
        return fields

    @property
    def facts(self) -> Mapping[str, Any]:
        """What changes a logit besides the weights."""
        windows = [shape.window for shape in self.shapes]
        facts = {name: getattr(self.config, name) for name in _FACTS}
        return facts | {"head_dim": self.shapes[0].head_dim, "windows": windows}

    @property
    def spec(self) -> ModelSpec:
        """What a manifest says of it."""
        config = self.config
        feed_forward = 3 * config.hidden_size * config.intermediate_size
        return ModelSpec(
            identity="",
            architecture=config.model_type,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_ids=(),
            memory=MemorySpec(),
            caches=tuple(
                CacheSpec(layer, shape.kv_heads, shape.graph_head_dim, shape.window)
                for layer, shape in enumerate(self.shapes)
            ),
            details={"feed_forward_parameters": config.num_hidden_layers * feed_forward},
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names that the graph gives its matrices, as they lie in it."""
        return ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")

    def makes_rows(self, weight: str) -> bool:
        """There are no memory rows."""
        return False

    def build(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        """Record the graph: the drawing at the top of this file, layer by layer."""
        attentions = self._attentions(graph, step)
        x, pending = step.tokens.embedding, None
        for layer, shape in enumerate(self.shapes):
            path = f"/model/layers.{layer}"
            normed, x = self.add_norm(graph, f"{path}/input_layernorm", x, pending)
            name = f"model.layers.{layer}.self_attn"
            attention = attentions[shape.window]
            pending = attention(layer, f"{path}/self_attn", normed, self.attention_weights(name))
            if f"{name}.o_proj.bias" in self.weights:
                bias = graph.vector(f"{name}.o_proj.bias", self.array(f"{name}.o_proj.bias"))
                pending = graph.op(f"{path}/self_attn/o_proj/Add", "Add", [pending, bias])
            normed, x = self.add_norm(graph, f"{path}/post_attention_layernorm", x, pending)
            matrices = self.arrays(f"model.layers.{layer}.mlp", _FEED_FORWARD)
            pending = swiglu(graph, f"{path}/mlp", normed, matrices)
        assert pending is not None  # there are layers
        x, pending = wanted_positions(graph, step, x=x, pending=pending)
        normed, _ = self.add_norm(graph, "/model/norm", x, pending)
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return graph.linear("/lm_head", normed, self.array(f"{head}.weight"))

    def reference(
        self, device: str = "cpu", compute_dtype: torch.dtype = torch.float32
    ) -> LlamaReference:
        """The network of transformers over the weights where they are."""
        network = _empty_network(self.config)
        network.load_state_dict(dict(self.weights), strict=False, assign=True)
        network.tie_weights()
        # Not a weight, so not among those assigned: made again, outside of the meta device.
        network.model.rotary_emb = type(network.model.rotary_emb)(self.config)
        network = network.requires_grad_(False).eval().to(device)
        return LlamaReference(converting(network, compute_dtype), self.shapes)

    def _attentions(self, graph: GraphBuilder, step: StepInputs) -> dict[int | None, Attention]:
        """One for each window, which have the rotary embedding in common."""
        rotary = self._rotary()
        shapes = {shape.window: shape for shape in self.shapes}
        return {
            window: Attention(graph, step, shape, rotary, "" if window is None else "window.")
            for window, shape in shapes.items()
        }

    def _rotary(self) -> Rotary:
        """The network's own rotary embedding at every position: half of it, for it repeats."""
        positions = torch.arange(self.config.max_position_embeddings).unsqueeze(0)
        rotary = type(_empty_network(self.config).model.rotary_emb)(self.config)
        cosine, sine = rotary(torch.zeros(1), positions)
        half = self.shapes[0].head_dim // 2  # of [1, P, head_dim]
        return Rotary(cosine[0, :, :half].numpy(), sine[0, :, :half].numpy())


def _empty_network(config: Any) -> Any:
    """The network of transformers without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _attention_shapes(config: Any) -> tuple[AttentionShape, ...]:
    """The attention of each layer; a window that holds the whole context is none."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads, head_dim
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= config.max_position_embeddings:
        window = None
    every = ["sliding_attention"] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or every
    return tuple(
        AttentionShape(*heads, window if kind == "sliding_attention" else None) for kind in kinds
    )


def _refuse(config: Any) -> None:
    """Name, in a ValueError, what the network computes and the graph would not."""
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act is {config.hidden_act!r}, expected 'silu'.")
    if getattr(config, "mlp_bias", False):
        raise ValueError("mlp_bias is true; feed-forward networks have no biases here.")
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}, expected one of {', '.join(_ROPE_TYPES)}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("its rotary embedding turns a part of each head only.")


class LlamaReference:
    """The network of transformers as a judge; see `Reference`."""

    def __init__(self, network: Any, shapes: Sequence[AttentionShape]) -> None:
        self.network = network
        self._shapes = shapes

    def rows(self, chunk: int | None = None) -> Rows:
        """Embeddings of tokens, and no rows."""
        return EmbeddingRows(self.network.model.embed_tokens, chunk)

    def logits(self, ids: Sequence[int], chunk: int) -> Iterator[Floats]:
        """Logits [<= chunk, V] of a text: only the head, whose output is large, goes by chunks."""
        tokens = torch.tensor([ids], device=self.network.device)
        with torch.inference_mode():
            hidden = self.network.model(tokens, use_cache=False).last_hidden_state[0]
        for start in range(0, len(ids), chunk):
            with torch.inference_mode():
                logits = self.network.lm_head(hidden[start : start + chunk])
            yield logits.float().cpu().numpy()

    def fed_logits(self, ids: Sequence[int], embedding: Floats, rows: Floats) -> Floats:
        """Logits [T, V] out of embeddings [U, D] of the distinct ids, sorted."""
        index = np.unique(np.asarray(ids), return_inverse=True)[1]
        fed = torch.from_numpy(embedding[index][None]).to(self.network.device)
        with torch.inference_mode():
            found = self.network(inputs_embeds=fed, use_cache=False).logits[0]
        logits: Floats = found.float().cpu().numpy()
        return logits

    def runtime(self) -> Runtime:
        """The network behind the contract of runtimes."""
        return TorchReference(FedNetwork(self.network, self._shapes))

    def run(self, ids: torch.Tensor) -> None:
        """Compute a text [1, T], for what listens."""
        with torch.inference_mode():
            self.network.model(ids, use_cache=False)

    def stored(self) -> Sequence[StoredKV]:
        """What each cache stores, in the order of the layers."""
        layers = zip(self.network.model.layers, self._shapes, strict=True)
        return [
            StoredKV(
                getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj),
                layer.self_attn.v_proj,
                shape.kv_heads,
            )
            for layer, shape in layers
        ]

    @torch.no_grad()
    def stages(self, windows: torch.Tensor) -> Iterator[Stage]:
        """Yield every layer, and at last the head, before it is run over texts [N, T]."""
        model = self.network.model
        stream = [model.embed_tokens(part) for part in windows.split(_BATCH)]
        for number, (layer, shape) in enumerate(zip(model.layers, self._shapes, strict=True)):
            yield Stage(f"model.layers.{number}", _matrices(layer, shape))
            for place, x in enumerate(stream):
                stream[place] = layer(x, **self._fed(x, shape))
        yield Stage("", {"lm_head": Matrix(self.network.lm_head)})
        for x in stream:
            self.network.lm_head(model.norm(x))

    def _fed(self, x: torch.Tensor, shape: AttentionShape) -> dict[str, Any]:
        """What the network gives a layer besides texts [N, T, D], from their start."""
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        make = create_causal_mask if shape.window is None else create_sliding_window_causal_mask
        mask = make(
            config=self.network.config,
            inputs_embeds=x,
            attention_mask=None,
            position_ids=positions,
            **{CACHE: None},
        )
        rotary = self.network.model.rotary_emb(x, position_ids=positions)
        return {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}


def _matrices(layer: Any, shape: AttentionShape) -> dict[str, Matrix]:
    return {
        "self_attn.qkv_proj": Matrix(layer.self_attn.q_proj),
        "self_attn.o_proj": Matrix(layer.self_attn.o_proj, partial(widen_heads, shape=shape)),
        "mlp.gate_up_proj": Matrix(layer.mlp.gate_proj),
        "mlp.down_proj": Matrix(layer.mlp.down_proj),
    }


class EmbeddingRows:
    """What a table stores of a network without memory; see `edge_memllm.table.source.Rows`."""

    def __init__(self, embedding: Any, chunk: int | None) -> None:
        """Take how many tokens go at a time; None takes as many as have 128 MiB at most."""
        self._embedding = embedding
        self._chunk = chunk or default_chunk(1, embedding.weight.shape[1])

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings [U, D] of tokens."""
        found: Floats = self._embedding.weight[torch.from_numpy(ids)].float().cpu().numpy()
        return found

    def rows(self, ids: Ids) -> Floats:
        """Return no rows of no width, [U, 0, 0]."""
        return np.empty((len(ids), 0, 0), np.float32)

    def chunks(self, order: Ids) -> Iterator[tuple[Floats, Floats]]:
        """Yield embeddings [N, D] and no rows [N, 0, 0] of tokens, in this order."""
        for start in range(0, len(order), self._chunk):
            ids = order[start : start + self._chunk]
            yield self.embeddings(ids), self.rows(ids)


class FedNetwork:
    """The network as a `RowNetwork`, which is fed embeddings alone."""

    dtype = torch.float32

    def __init__(self, network: Any, shapes: Sequence[AttentionShape]) -> None:
        self._network = network
        self.cache_shapes = [(shape.kv_heads, shape.head_dim) for shape in shapes]
        # Without windows, for whose caches nothing can be forgotten: what is seen is masked.
        self.config: Any = LlamaConfig(
            num_hidden_layers=network.config.num_hidden_layers,
            max_position_embeddings=network.config.max_position_embeddings,
        )

    def eval(self) -> FedNetwork:
        """Return the network, which is ready to compute."""
        return self

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
        fed = functional.embedding(token_rows.index, token_rows.embedding)
        found = self._network(
            inputs_embeds=fed,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{CACHE: cache},
        )
        return SimpleNamespace(logits=found.logits)
