"""Gemma 3, its text: norms before and after each part, two rotary bases, windows in most layers.

    x_l --------+norm--> input_layernorm --> attention --> post_attention_layernorm --+
    pending ----'  |                                                                  |
                   x -------------------------------------------------------------+norm--> ...
    ... pre_feedforward_layernorm --> GeGLU --> post_feedforward_layernorm --> pending

`+norm` is SkipSimplifiedLayerNormalization: it adds, norms, and gives both. Norms multiply by one
more than their weight. The sum x grows beyond what float16 holds (to 104,000 in the 270M), so the
graph keeps a part of it: every norm that reads the sum gives the same for it, and all that is added
comes out of norms and of the embedding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edge_memllm_export.architectures.dense import FEED_FORWARD, Dense, RotaryKind, refuse_rotary
from edge_memllm_export.architectures.mapped_weights import FloatEmbedding
from edge_memllm_export.architectures.multimodal import MultimodalText
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.feed_forward import geglu
from edge_memllm_export.graph.step import StepInputs, wanted_positions

MODEL_TYPES = ("gemma3_text", "gemma3")
# A power of two, so that nothing is rounded: sums up to four million in float16.
_PART_OF_SUM = 2.0**-6
_LAYER_TYPES = ("full_attention", "sliding_attention")


class Gemma3(MultimodalText, Dense):
    """A network of the family; see `Architecture`."""

    whole_type = "gemma3"
    other_modules = ("vision_tower", "multi_modal_projector")
    own_facts = ("hidden_activation", "layer_types", "query_pre_attn_scalar")
    heads_first = True
    feed_forward_norm = "pre_feedforward_layernorm"

    def refuse(self, config: Any) -> None:
        """Name, in a ValueError, what the network computes and the graph would not."""
        for name, expected in (
            ("hidden_activation", "gelu_pytorch_tanh"),
            ("attn_logit_softcapping", None),
            ("final_logit_softcapping", None),
        ):
            if getattr(config, name) != expected:
                raise ValueError(f"{name} is {getattr(config, name)!r}, expected {expected!r}.")
        if config.use_bidirectional_attention:
            raise ValueError("it attends to what comes later, so it does not generate text.")
        for kind in config.layer_types:
            if kind not in _LAYER_TYPES:
                raise ValueError(f"layer type {kind!r}, expected {' or '.join(_LAYER_TYPES)}.")
            refuse_rotary(config.rope_parameters[kind])

    def rotary_kinds(self) -> tuple[RotaryKind, ...]:
        """Return the types of the layers, each of which has its angles."""
        return tuple((kind,) for kind in self.config.layer_types)

    def build(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        """Record the graph: the drawing at the top of this file, layer by layer."""
        part = graph.vector("model.embed_tokens.part", np.array([_PART_OF_SUM]))
        x = graph.op("/model/embed_tokens/Mul", "Mul", [step.tokens.embedding, part])
        pending = None
        for layer, attention in enumerate(self.attentions(graph, step)):
            path = f"/model/layers.{layer}"
            normed, x = self.add_norm(graph, f"{path}/input_layernorm", x, pending)
            last = layer + 1 == len(self.shapes)
            output = self.attended(graph, attention, layer, normed, wanted=last)
            if last:  # nothing behind its attention is kept
                (x,) = wanted_positions(graph, step, x=x)
            pending = self._part(graph, f"{path}/post_attention_layernorm", output)
            normed, x = self.add_norm(graph, f"{path}/pre_feedforward_layernorm", x, pending)
            matrices = self.arrays(f"model.layers.{layer}.mlp", FEED_FORWARD)
            output = geglu(graph, f"{path}/mlp", normed, matrices)
            pending = self._part(graph, f"{path}/post_feedforward_layernorm", output)
        assert pending is not None  # there are layers
        return self.head(graph, x, pending)

    def add_norm(
        self, graph: GraphBuilder, path: str, x: ir.Value, pending: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Return the norm at `path` of x + pending, a part of the sum, and that part itself."""
        weight = self.array(f"{path[1:].replace('/', '.')}.weight")
        return graph.add_norm(path, x, pending, weight, self.epsilon * _PART_OF_SUM**2)

    def _part(self, graph: GraphBuilder, path: str, output: ir.Value) -> ir.Value:
        """What an output adds to the part of the sum that is kept: its norm."""
        weight = self.array(f"{path[1:].replace('/', '.')}.weight") * np.float32(_PART_OF_SUM)
        return graph.norm(path, output, weight, self.epsilon)

    def plain_array(self, name: str) -> np.ndarray:
        """Return one weight as the graph has it: a norm's in float32, one added."""
        weight = super().plain_array(name)
        return weight.astype(np.float32) + 1 if name.endswith("norm.weight") else weight

    def complete(self, network: Any) -> None:
        """Make again what is no weight; embeddings come out scaled, by a factor in float32."""
        super().complete(network)
        factor = torch.tensor(self.config.hidden_size**0.5).item()
        network.model.embed_tokens = FloatEmbedding(network.model.embed_tokens, factor)
