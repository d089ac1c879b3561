"""MemoryLLM (https://arxiv.org/abs/2602.00398): beta 0, Flex (1 to 7), and dense (8).

One block with FFN-C; `+norm` is SkipSimplifiedLayerNormalization, which adds, normalises, and gives
both: so a sum always waits for the norm that follows it.

    x_l --------+norm--> input_layernorm --> attention --+
    pending ----'  |                                     |
                   x ---------------------------------+norm--> post_attention_layernorm --> FFN-C
                                                         |                                    |
                          M_l (gain applied) --> Add --- h                                    |
                                                  |                                           |
                                             x_{l+1}                                    pending

Beta 0 has no FFN-C: the attention output itself is pending. Beta 8 has no M_l.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edge_memllm.arrays import Floats
from edge_memllm.artifact.model_spec import CacheSpec, MemorySpec, ModelSpec
from edge_memllm.modeling import MemoryLLMConfig, MemoryLLMForCausalLM, TokenRows
from edge_memllm.modeling.configuration import FORMER_CHOICES
from edge_memllm.modeling.rows import NetworkRows
from edge_memllm.modeling.stored_weights import (
    describing,
    expected_weights,
    network_described,
    network_over,
)
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.source import Rows
from edge_memllm_export.architectures.architecture import Source, StoredKV
from edge_memllm_export.architectures.mapped_weights import LayerWeights, converting
from edge_memllm_export.architectures.text_reference import TextReference
from edge_memllm_export.graph.attention import Attention, AttentionShape, Rotary
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.feed_forward import swiglu
from edge_memllm_export.graph.step import StepInputs, wanted_positions
from edge_memllm_export.graph.tokens import layer_memory
from edge_memllm_runtimes.torch_reference import TorchReference

MODEL_TYPE = MemoryLLMConfig.model_type
_LEARNED_GAIN = "model.token_memory.gain"
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# What rows are made of, besides the embedding: FFN-M, its norms, and rows that were trained.
_MAKES_ROWS = re.compile(
    r"model\.layers\.\d+\.(memory|memory_layernorm)\..+"
    r"|model\.token_memory\.(network|norm|rows)\..+"
)
# The fields that change what the network computes; the rest may differ between equal models.
_FACTS = (
    "beta",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "memory_intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)


@dataclass(frozen=True)
class Shape:
    """The sizes and switches of a network that its graph is recorded from."""

    layers: int
    heads: AttentionShape
    has_compute: bool  # an FFN-C
    qk_norm: bool
    tied_head: bool


class MemoryLLM(LayerWeights):
    """A network of the family; see `Architecture`."""

    def __init__(self, source: Source) -> None:
        """Read the source; UnusableCheckpointError says what no network of the family has."""
        with describing(source.where, "describes no network"):
            self.config = MemoryLLMConfig.from_dict(dict(source.fields))
            expected = expected_weights(self.config)
        config: Any = self.config
        self.weights = source.weights(
            expected,
            tied=config.tie_word_embeddings,
            described=network_described(config),
        )
        self.epsilon: float = config.rms_norm_eps
        self.context: int = config.max_position_embeddings
        self.shape = Shape(
            layers=config.num_hidden_layers,
            heads=AttentionShape(
                config.num_attention_heads, config.num_key_value_heads, config.head_dim
            ),
            has_compute=config.has_compute,
            qk_norm=config.qk_norm,
            tied_head=config.tie_word_embeddings,
        )

    @property
    def fields(self) -> Mapping[str, Any]:
        """The configuration, complete."""
        fields: dict[str, Any] = self.config.to_dict()
        return fields

    @property
    def facts(self) -> Mapping[str, Any]:
        """What changes a logit besides the weights; biases show in the weights' names."""
        config: Any = self.config
        facts = {name: getattr(config, name) for name in _FACTS} | FORMER_CHOICES
        facts["memory_gain"] = self._gain()
        if config.qk_norm:
            facts["qk_norm"] = True
        if config.rope_parameters.get("rope_type", "default") != "default":
            facts["rope_parameters"] = config.rope_parameters
        return facts

    @property
    def spec(self) -> ModelSpec:
        """What a manifest says of it."""
        config, shape = self.config, self.shape
        rows, width = config.memory_layers, config.hidden_size
        memory = MemorySpec(rows, width, "added", self._gain()) if rows else MemorySpec()
        computed = 3 * width * config.intermediate_size if shape.has_compute else 0
        return ModelSpec(
            identity="",
            architecture="memoryllm",
            hidden_size=width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads.heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=self.context,
            bos_token_id=config.bos_token_id,
            eos_token_ids=(),
            memory=memory,
            caches=tuple(
                CacheSpec(layer, shape.heads.kv_heads, shape.heads.graph_head_dim)
                for layer in range(shape.layers)
            ),
            details={"beta": config.beta, "feed_forward_parameters": shape.layers * computed},
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names that the graph gives its matrices, as they lie in it."""
        compute = ("gate_up_proj", "down_proj") if self.shape.has_compute else ()
        return ("qkv_proj", "o_proj", *compute, "lm_head")

    @property
    def notes(self) -> Sequence[str]:
        """Nothing is left out."""
        return ()

    def makes_rows(self, weight: str) -> bool:
        """Whether a weight does nothing but make memory rows."""
        return _MAKES_ROWS.fullmatch(weight) is not None

    def build(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        """Record the graph: the drawing at the top of this file, layer by layer."""
        shape = self.shape
        attention = Attention(graph, step, shape.heads, self._rotary())
        x, pending = step.tokens.embedding, None
        for layer in range(shape.layers):
            path = f"/model/layers.{layer}"
            normed, x = self.add_norm(graph, f"{path}/input_layernorm", x, pending)
            weights = self.attention_weights(f"model.layers.{layer}.self_attn")
            pending = attention(layer, f"{path}/self_attn", normed, weights)
            if shape.has_compute:
                normed, x = self.add_norm(graph, f"{path}/post_attention_layernorm", x, pending)
                matrices = self.arrays(f"model.layers.{layer}.mlp", _FEED_FORWARD)
                pending = swiglu(graph, f"{path}/mlp", normed, matrices)
            if step.tokens.memory is not None:
                memory = layer_memory(graph, step.tokens.memory, layer)
                x = graph.op(f"{path}/memory/Add", "Add", [x, memory])
        assert pending is not None  # there are layers
        x, pending = wanted_positions(graph, step, x=x, pending=pending)
        normed, _ = self.add_norm(graph, "/model/norm", x, pending)
        head = "model.embed_tokens" if shape.tied_head else "lm_head"
        return graph.linear("/lm_head", normed, self.array(f"{head}.weight"))

    def reference(
        self, device: str = "cpu", compute_dtype: torch.dtype = torch.float32
    ) -> MemoryLLMReference:
        """The network over the mapped weights; its matrices compute in `compute_dtype`."""
        network = network_over(self.config, self.weights).to(device)
        return MemoryLLMReference(converting(network, compute_dtype), self.shape, self.parts)

    @property
    def rotary_values(self) -> int:
        """Numbers that the tables of angles hold for each position."""
        return self.shape.heads.graph_head_dim

    def heads(self, layer: int) -> AttentionShape:
        """Return the heads of a layer, which are the same in all."""
        return self.shape.heads

    def _gain(self) -> tuple[float, ...]:
        """One factor per layer: the configuration's, all ones if none, times the learned one."""
        layers = self.shape.layers
        gain = self.config.memory_gain or (1.0,) * layers
        learned = self.weights.get(_LEARNED_GAIN, torch.ones(layers))
        return tuple(map(operator.mul, gain, learned.tolist()))

    def _rotary(self) -> Rotary:
        """The network's own rotary embedding at every position: half of it, for it repeats."""
        positions = torch.arange(self.context).unsqueeze(0)
        cosine, sine = LlamaRotaryEmbedding(self.config)(torch.zeros(1), positions)
        half = self.shape.heads.head_dim // 2  # of [1, P, head_dim]
        return Rotary(cosine[0, :, :half].numpy(), sine[0, :, :half].numpy())


class MemoryLLMReference(TextReference):
    """The network of the family as a judge; see `Reference`."""

    def __init__(
        self,
        network: MemoryLLMForCausalLM,
        shape: Shape,
        parts: Callable[[str], tuple[str, ...]],
    ) -> None:
        super().__init__(network, parts)
        self._shape = shape

    def rows(self, chunk: int | None = None) -> Rows:
        """Embeddings and memory rows of tokens, without gain, computed a chunk at a time."""
        return NetworkRows(self.network, chunk)

    def fed_logits(self, ids: Sequence[int], embedding: Floats, rows: Floats) -> Floats:
        """Logits [T, V] out of embeddings [U, D] and rows [U, L, D] of the distinct ids, sorted."""
        index = np.unique(np.asarray(ids), return_inverse=True)[1].reshape(1, -1)
        arrays = (index, embedding, rows)
        fed = TokenRows(*(torch.from_numpy(array).to(self.network.device) for array in arrays))
        with torch.inference_mode():
            logits: Floats = self.network(token_rows=fed).logits[0].float().cpu().numpy()
        return logits

    def runtime(self) -> Runtime:
        """The network behind the contract of runtimes."""
        return TorchReference(self.network)

    def stored(self) -> Sequence[StoredKV]:
        """What each cache stores, in the order of the layers."""
        attentions = [layer.self_attn for layer in self.network.model.layers]
        return [
            StoredKV(
                each.k_norm if self._shape.qk_norm else each.k_proj,
                each.v_proj,
                self._shape.heads.kv_heads,
            )
            for each in attentions
        ]
