"""Dense networks of the llama family: Llama (SmolLM, TinyLlama), Mistral, Qwen2 and Qwen3.

They differ in switches alone: biases of projections, norms of queries and keys, which layers look
at a window. A layer:

    x_l --------+norm--> input_layernorm --> attention --+
    pending ----'  |                                     |
                   x ---------------------------------+norm--> post_attention_layernorm --> SwiGLU
                                                         |                                    |
                                                      x_{l+1}                              pending

`+norm` is SkipSimplifiedLayerNormalization: it adds, norms, and gives both.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from edge_memllm_export.architectures.dense import FEED_FORWARD, Dense, refuse_rotary
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.feed_forward import swiglu
from edge_memllm_export.graph.step import StepInputs, wanted_positions

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class Llama(Dense):
    """A network of the family; see `Architecture`."""

    def refuse(self, config: Any) -> None:
        """Name, in a ValueError, what the network computes and the graph would not."""
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act is {config.hidden_act!r}, expected 'silu'.")
        refuse_rotary(config.rope_parameters)

    def build(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        """Record the graph: the drawing at the top of this file, layer by layer."""
        x, pending = step.tokens.embedding, None
        for layer, attention in enumerate(self.attentions(graph, step)):
            path = f"/model/layers.{layer}"
            normed, x = self.add_norm(graph, f"{path}/input_layernorm", x, pending)
            last = layer + 1 == len(self.shapes)
            pending = self.attended(graph, attention, layer, normed, wanted=last)
            if last:  # nothing behind its attention is kept
                (x,) = wanted_positions(graph, step, x=x)
            normed, x = self.add_norm(graph, f"{path}/post_attention_layernorm", x, pending)
            name = f"model.layers.{layer}.mlp"
            matrices = self.arrays(name, FEED_FORWARD)
            biases = self.biases(name, FEED_FORWARD[:2])
            pending = swiglu(graph, f"{path}/mlp", normed, matrices, biases)
            pending = self.biased(graph, f"{path}/mlp/down_proj", pending)
        assert pending is not None  # there are layers
        return self.head(graph, x, pending)
