"""Gemma 4, its text (E2B, E4B; 31B, which has no rows): norms around every part, rows as gates.

    x --+norm--> input_layernorm --> attention --> post_attention_layernorm --+
    x ----------------------------------------------------------------------+norm--> ...
    ... pre_feedforward_layernorm --> GeGLU --> post_feedforward_layernorm --> Add --> x
    x --> per-layer input, see `per_layer_inputs` --> pending;  x = layer_scalar * (x + pending)

Most layers look at a window, every few look at all with wider heads, of which a part is turned; in
the 31B those have their keys as values. `+norm` adds and norms in one operator, so the scalar comes
after the sum: the norm does not see it but for its sign and its epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from edge_memllm.errors import ExportError
from edge_memllm_export.architectures.architecture import Weights
from edge_memllm_export.architectures.dense import FEED_FORWARD
from edge_memllm_export.architectures.per_layer_inputs import LayerInputs, PerLayerInputs
from edge_memllm_export.graph.attention import AttentionShape
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.feed_forward import geglu
from edge_memllm_export.graph.step import StepInputs, wanted_positions

MODEL_TYPES = ("gemma4_text", "gemma4")
_SCALAR = "layer_scalar"


class Gemma4(PerLayerInputs):
    """A network of the family; see `Architecture`."""

    whole_type = "gemma4"
    other_modules = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
    own_facts = (*PerLayerInputs.own_facts, "attention_k_eq_v", "use_double_wide_mlp")

    def refuse(self, config: Any) -> None:
        """Name, in a ValueError, what the network computes and the graph would not."""
        if config.enable_moe_block:
            raise ValueError(
                f"its layers choose among {config.num_experts} experts (MoE, as in 26B-A4B), "
                "which are not exported."
            )
        if config.use_bidirectional_attention == "all":
            raise ValueError("it attends to what comes later, so it does not generate text.")
        rows = config.vocab_size_per_layer_input
        if config.hidden_size_per_layer_input and rows < config.vocab_size:
            raise ValueError(
                f"vocab_size_per_layer_input is {rows}, expected a row for each of "
                f"{config.vocab_size} tokens."
            )
        super().refuse(config)

    def refuse_angles(self, rope: Mapping[str, Any]) -> None:
        """Name, in a ValueError, angles that are no table; a part of a head may stand still."""
        if rope["rope_type"] != "proportional":
            super().refuse_angles(rope)

    def expected(self, network: Any) -> Weights:
        """Return the weights that a network has, its scalars among them."""
        scalars = ((name, each) for name, each in network.named_buffers() if _SCALAR in name)
        return {**super().expected(network), **dict(scalars)}

    @property
    def facts(self) -> Mapping[str, Any]:
        """What changes a logit besides the weights; heads differ by layer."""
        return {**super().facts, "heads": [[s.kv_heads, s.head_dim] for s in self.shapes]}

    def attention_shapes(self) -> tuple[AttentionShape, ...]:
        """Return the heads of each layer; scores are not scaled."""
        config, shapes = self.config, []
        for layer, kind in enumerate(config.layer_types):
            own = config.per_layer_config[layer]
            heads = config.num_attention_heads, own.num_key_value_heads, own.head_dim
            shapes.append(AttentionShape(*heads, self.window(kind), 1.0))
        return tuple(shapes)

    def feed_forward_parameters(self) -> int:
        """Return how many weights all feed-forward networks have."""
        shared = self.config.num_kv_shared_layers if self.config.use_double_wide_mlp else 0
        each: int = super().feed_forward_parameters() // self.config.num_hidden_layers
        return each * int(self.config.num_hidden_layers + shared)

    def build(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        """Record the graph: the drawing at the top of this file, layer by layer."""
        x, pending = step.tokens.embedding, None
        inputs = self.layer_inputs(graph, step)
        for layer, attention in enumerate(self.attentions(graph, step)):
            path = f"/model/layers.{layer}"
            normed, x = self._sum_norm(graph, layer, f"{path}/input_layernorm", x, pending)
            last = layer + 1 == self.own_layers  # behind its attention nothing is kept
            output = self.attended(graph, attention, layer, normed, wanted=last)
            if last:
                x, inputs = self._wanted(graph, step, x, inputs)
            output = self._norm(graph, f"{path}/post_attention_layernorm", output)
            normed, x = self.add_norm(graph, f"{path}/pre_feedforward_layernorm", x, output)
            matrices = self.arrays(f"model.layers.{layer}.mlp", FEED_FORWARD)
            output = geglu(graph, f"{path}/mlp", normed, matrices)
            pending = self._norm(graph, f"{path}/post_feedforward_layernorm", output)
            if inputs is not None:
                x = graph.op(f"{path}/mlp/Add", "Add", [x, pending])
                pending = self.gated(graph, layer, x, inputs)
        normed, _ = self._sum_norm(graph, len(self.shapes), "/model/norm", x, pending)
        return self.logits(graph, normed)

    def _wanted(
        self, graph: GraphBuilder, step: StepInputs, x: ir.Value, inputs: LayerInputs | None
    ) -> tuple[ir.Value, LayerInputs | None]:
        """What layers work on, at the wanted positions."""
        if inputs is None:
            return wanted_positions(graph, step, x=x)[0], None
        x, rows = wanted_positions(graph, step, x=x, rows=inputs.rows)
        return x, replace(inputs, rows=rows)

    def _norm(self, graph: GraphBuilder, path: str, x: ir.Value) -> ir.Value:
        weight = self.array(f"{path[1:].replace('/', '.')}.weight")
        return graph.norm(path, x, weight, self.epsilon)

    def _sum_norm(
        self, graph: GraphBuilder, layer: int, path: str, x: ir.Value, pending: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """The norm of a layer's input, scalar * (x + pending) of the layer before; and that input.

        Behind the last layer that input is read by nothing, and is the sum without the scalar.
        """
        if pending is None:
            return self.add_norm(graph, path, x, None)
        name = f"model.layers.{layer - 1}.{_SCALAR}"
        scalar = self.array(name)
        value = float(scalar[0])
        if value == 0:
            raise ExportError(f"{name} is 0: nothing of the layers before is left.")
        weight = self.array(f"{path[1:].replace('/', '.')}.weight")
        weight = weight if value > 0 else -weight
        normed, total = graph.add_norm(path, x, pending, weight, self.epsilon / value**2)
        if value == 1 or layer == len(self.shapes):
            return normed, total
        factor = graph.vector(name, scalar)
        return normed, graph.op(f"/model/layers.{layer - 1}/{_SCALAR}/Mul", "Mul", [total, factor])
