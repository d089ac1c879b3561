"""Gemma 3n, its text (E2B, E4B): four streams, of which each layer computes one; rows as gates.

The streams S_0..S_3 are one tensor [B,T,4,D]; a is the active one (0):

    start    S_0 = x_0;  S_i = A_i x_0 |x_0| / max(|A_i x_0|, floor)
    predict  S_i = S_i + sum_j C_ij S_j,       C = W_pred m(S_a) as [4,4]
    compute  n = RMSNorm(S_a)
             y = (S_a + RMSNorm(attention(n)) + n + RMSNorm(R L n)) / sqrt(2)     R L: Laurel
             u = y + RMSNorm(GeGLU(RMSNorm(y)))
    correct  S_i = S_i + b_i (u - S_a),        b = W_corr m(u) + 1
    row      S_i = S_i + g for all but S_0,    g out of scale * S_a, see `per_layer_inputs`
    end      RMSNorm(S_0 + sum_i Z_i S_i |S_0| / max(|Z_i S_i|, floor)), and the capped head

where m(x) = tanh(W_r RMSNorm(x) / D). The first layers' gates are sparse, see `geglu`. The streams
are those of AltUp (https://arxiv.org/abs/2301.13310).

Streams grow beyond what float16 holds, and many small operators have no kernel for it on a CPU: all
between the large matrices is float32. Matrices that read a stream without a norm get a part of it,
and those that read what it opens of a row.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edge_memllm_export.architectures.architecture import Folding
from edge_memllm_export.architectures.dense import FEED_FORWARD
from edge_memllm_export.architectures.per_layer_inputs import LayerInputs, PerLayerInputs
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.feed_forward import geglu
from edge_memllm_export.graph.step import StepInputs, wanted_positions

MODEL_TYPES = ("gemma3n_text", "gemma3n")
# A power of two, so that nothing is rounded.
_PART = 2.0**-6
_LEAST_SQUARE = 1e-5  # of a projected stream's numbers, in the mean; less counts as this
_START, _END = "altup_projections", "altup_unembed_projections"
_LAUREL = ("linear_left", "linear_right")
_FLOAT = "float32"


class Gemma3n(PerLayerInputs):
    """A network of the family; see `Architecture`."""

    whole_type = "gemma3n"
    part_of_rows = _PART
    other_modules = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
    own_facts = (
        *PerLayerInputs.own_facts,
        "activation_sparsity_pattern",
        "altup_active_idx",
        "altup_correct_scale",
        "altup_num_inputs",
    )

    def refuse(self, config: Any) -> None:
        """Name, in a ValueError, what the network computes and the graph would not."""
        streams, active = config.altup_num_inputs, config.altup_active_idx
        if streams < 2:
            raise ValueError(f"altup_num_inputs is {streams}, expected at least 2 streams.")
        if not 0 <= active < streams:
            raise ValueError(f"altup_active_idx is {active}, expected one of {streams} streams.")
        if config.hidden_size_per_layer_input < 1:
            raise ValueError("hidden_size_per_layer_input is 0, expected rows for every layer.")
        for layer, part in enumerate(config.activation_sparsity_pattern):
            if not 0 <= part < 1:
                raise ValueError(
                    f"activation_sparsity_pattern is {part} in layer {layer}, expected a part "
                    "from 0 to less than 1."
                )
        super().refuse(config)

    def feed_forward_parameters(self) -> int:
        """Return how many weights all feed-forward networks have; widths differ by layer."""
        return 3 * int(self.config.hidden_size) * sum(self.config.intermediate_size)

    @property
    def delicate_kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those around the rows; those that make and unite streams; and Laurel's, of rank 64.

        A few hundredths of all weights; llama.cpp leaves them as they are.
        """
        return (_START, *_LAUREL, *super().delicate_kinds, _END)

    def folding(self, matrix: str) -> Folding | None:
        """Return where factors of a matrix's columns can cancel; see `Architecture`."""
        kind = matrix.removesuffix(".weight").rpartition(".")[2]
        # Besides queries, keys and values, Laurel reads their norm.
        return None if kind in ("qkv_proj", "q_proj") else super().folding(matrix)

    def parts(self, matrix: str) -> tuple[str, ...]:
        """Return the weights that make up a matrix of the graph; see `Architecture`."""
        path, _, kind = matrix.removesuffix(".weight").rpartition(".")
        others = range(self.config.altup_num_inputs - 1)
        if kind == _START:
            return tuple(f"{path}.{_START}.{place}.weight" for place in others)
        if kind == _END:
            return (f"model.{_END}.{int(path.rpartition('.')[2]) - 1}.weight",)
        return super().parts(matrix)

    def complete(self, network: Any) -> None:
        """Make again what is no weight: angles, and factors."""
        super().complete(network)
        model, width = network.model, self.config.hidden_size
        model.per_layer_projection_scale = torch.tensor(width**-0.5)
        model.per_layer_input_scale = torch.rsqrt(torch.tensor(2.0))
        for layer in model.layers:
            layer.altup.router_input_scale = torch.tensor(width**-1.0)

    def build(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        """Record the graph: the equations at the top of this file, layer by layer."""
        streams = self._start(graph, step.tokens.embedding)
        inputs = self.layer_inputs(graph, step)
        assert inputs is not None  # there are rows
        rows = _times(graph, "/model/rows/part", inputs.rows, self.part_of_rows)
        inputs = replace(inputs, rows=rows)
        for layer, attention in enumerate(self.attentions(graph, step)):
            path = f"/model/layers.{layer}"
            streams = self._predicted(graph, layer, streams)
            x = self._active(graph, f"{path}/altup/predict", streams)
            normed = self._norm(graph, f"{path}/input_layernorm", x)
            narrow = graph.cast(f"{path}/input_layernorm", normed, graph.compute_dtype)
            last = layer + 1 == self.own_layers  # behind its attention nothing is kept
            output = self.attended(graph, attention, layer, narrow, wanted=last)
            if last:
                streams, x, normed, rows = wanted_positions(
                    graph, step, streams=streams, x=x, normed=normed, rows=inputs.rows
                )
                inputs = replace(inputs, rows=rows)
            new = self._computed(graph, layer, x, normed, output)
            streams = self._corrected(graph, layer, streams, x, new)
            streams = self._with_row(graph, layer, streams, inputs)
        return self.logits(graph, self._end(graph, streams))

    def _start(self, graph: GraphBuilder, embedding: ir.Value) -> ir.Value:
        """The streams [B,T,4,D] of tokens, the projected ones as long as the embedding."""
        path, config = f"/model/{_START}", self.config
        weights = [self.array(name) for name in self.parts(f"model.{_START}.weight")]
        projected = _product(graph, path, embedding, np.concatenate(weights))
        projected = _reshaped(
            graph, path, projected, [config.altup_num_inputs - 1, config.hidden_size]
        )
        first = graph.cast(f"{path}/first", embedding, _FLOAT)
        first = _unsqueezed(graph, f"{path}/first", first, -2)
        length = _length(graph, f"{path}/first", first)
        resized = self._resized(graph, path, projected, length, 1.0)
        return graph.op(f"{path}/Concat", "Concat", [first, resized], {"axis": -2}, dtype=_FLOAT)

    def _predicted(self, graph: GraphBuilder, layer: int, streams: ir.Value) -> ir.Value:
        """The streams as a layer takes them: each one plus a mixture of all."""
        path, count = f"/model/layers.{layer}/altup/predict", self.config.altup_num_inputs
        modes = self._modes(graph, layer, path, self._active(graph, f"{path}/given", streams))
        mixture = self._small(graph, layer, path, "prediction_coefs", modes)
        mixture = _reshaped(graph, path, mixture, [count, count])
        return _sum(graph, path, streams, _op(graph, f"{path}/MatMul", mixture, streams))

    def _computed(
        self, graph: GraphBuilder, layer: int, x: ir.Value, normed: ir.Value, output: ir.Value
    ) -> ir.Value:
        """What a layer makes of its active stream, out of its norm and attention's output."""
        path, name = f"/model/layers.{layer}", f"model.layers.{layer}"
        output = self._added(graph, f"{path}/post_attention_layernorm", output)
        attended = _sum(graph, f"{path}/self_attn", x, output)
        laurel = self._laurel(graph, f"{path}/laurel", normed)
        # The norm takes back the root of 2, but for its epsilon.
        below = f"{path}/pre_feedforward_layernorm"
        norm = self.array(f"{name}.pre_feedforward_layernorm.weight")
        normed, total = graph.add_norm(below, attended, laurel, norm, 2 * self.epsilon)
        x = _times(graph, f"{path}/laurel/half", total, 0.5**0.5)
        sparse = self.config.activation_sparsity_pattern[layer]
        output = geglu(
            graph,
            f"{path}/mlp",
            graph.cast(below, normed, graph.compute_dtype),
            self.arrays(f"{name}.mlp", FEED_FORWARD),
            NormalDist().inv_cdf(sparse) if sparse else None,
        )
        output = self._added(graph, f"{path}/post_feedforward_layernorm", output)
        return _sum(graph, f"{path}/mlp", x, output)

    def _laurel(self, graph: GraphBuilder, path: str, normed: ir.Value) -> ir.Value:
        """The norm of a layer's input, and its detour through few numbers."""
        output = graph.cast(path, normed, graph.compute_dtype)
        for name in _LAUREL:
            weight = self.array(f"{path[1:].replace('/', '.')}.{name}.weight")
            output = graph.linear(f"{path}/{name}", output, weight)
        return _sum(graph, path, normed, self._added(graph, f"{path}/post_laurel_norm", output))

    def _corrected(
        self, graph: GraphBuilder, layer: int, streams: ir.Value, x: ir.Value, new: ir.Value
    ) -> ir.Value:
        """The predicted streams, each with a share of what is new in the active one."""
        path = f"/model/layers.{layer}/altup/correct"
        modes = self._modes(graph, layer, path, new)
        shares = self._small(graph, layer, path, "correction_coefs", modes)
        one = graph.constant(f"{path[1:].replace('/', '.')}.one", np.ones(1, np.float32))
        shares = _sum(graph, f"{path}/shares", shares, one)
        shares = _unsqueezed(graph, f"{path}/shares", shares, -1)
        innovation = _op(graph, f"{path}/Sub", new, x)
        innovation = _unsqueezed(graph, f"{path}/innovation", innovation, -2)
        return _sum(graph, path, streams, _op(graph, f"{path}/Mul", shares, innovation))

    def _with_row(
        self, graph: GraphBuilder, layer: int, streams: ir.Value, inputs: LayerInputs
    ) -> ir.Value:
        """The streams, all but the first with what the layer's row adds."""
        path, count = f"/model/layers.{layer}/altup/row", self.config.altup_num_inputs
        factor = np.array([_PART], np.float32)
        if self.config.altup_correct_scale:
            factor = factor * self.array(f"model.layers.{layer}.altup.correct_output_scale")
        name = f"model.layers.{layer}.altup.correct_output_scale"
        scale = graph.constant(name, factor.astype(np.float32))
        x = _op(graph, f"{path}/scale/Mul", self._active(graph, path, streams), scale)
        x = graph.cast(f"{path}/scale", x, graph.compute_dtype)
        added = graph.cast(path, self.gated(graph, layer, x, inputs), _FLOAT)
        others = np.array([[0.0], *[[1.0]] * (count - 1)], np.float32)
        others = graph.constant(f"{path[1:].replace('/', '.')}.others", others)
        added = _op(graph, f"{path}/Mul", _unsqueezed(graph, path, added, -2), others)
        return _sum(graph, path, streams, added)

    def opened(self, graph: GraphBuilder, layer: int, x: ir.Value) -> ir.Value:
        """Return W_g x, float32 [B,T,P], where a part of x is given."""
        path = f"/model/layers.{layer}/per_layer_input_gate/whole"
        return _times(graph, path, super().opened(graph, layer, x), 1 / _PART)

    def _end(self, graph: GraphBuilder, streams: ir.Value) -> ir.Value:
        """The norm of the streams' mean: the first, and the others projected and as long as it."""
        count = self.config.altup_num_inputs
        streams = _times(graph, "/model/streams/part", streams, _PART)
        total = _stream(graph, "/model/streams.0", streams, 0)
        length = _length(graph, "/model/streams.0", total)
        for number in range(1, count):
            path = f"/model/streams.{number}"
            other = _stream(graph, path, streams, number)
            other = graph.cast(path, other, graph.compute_dtype)
            (name,) = self.parts(f"{path[1:].replace('/', '.')}.{_END}.weight")
            other = _product(graph, f"{path}/{_END}", other, self.array(name))
            other = self._resized(graph, path, other, length, _PART)
            total = _sum(graph, path, total, other)
        # The norm takes back that this is a part, and the sum, but for its epsilon.
        norm, epsilon = self.array("model.norm.weight"), self.epsilon * (count * _PART) ** 2
        normed = graph.norm("/model/norm", total, norm, epsilon)
        return graph.cast("/model/norm", normed, graph.compute_dtype)

    def _modes(self, graph: GraphBuilder, layer: int, path: str, x: ir.Value) -> ir.Value:
        """m(x) [B,T,4] of a layer."""
        norm = self.array(f"model.layers.{layer}.altup.router_norm.weight")
        norm = norm.astype(np.float32) / self.config.hidden_size
        x = graph.norm(f"{path}/router_norm", x, norm, self.epsilon)
        routed = self._small(graph, layer, path, "modality_router", x)
        return graph.op(f"{path}/Tanh", "Tanh", [routed], dtype=_FLOAT)

    def _small(
        self, graph: GraphBuilder, layer: int, path: str, name: str, x: ir.Value
    ) -> ir.Value:
        """The product with a matrix of AltUp that is too small to be quantised."""
        weight = self.array(f"model.layers.{layer}.altup.{name}.weight")
        weight = np.ascontiguousarray(weight.T.astype(np.float32))
        small = graph.constant(f"{path[1:].replace('/', '.')}.{name}.weight", weight)
        return _op(graph, f"{path}/{name}/MatMul", x, small)

    def _active(self, graph: GraphBuilder, path: str, streams: ir.Value) -> ir.Value:
        return _stream(graph, path, streams, self.config.altup_active_idx)

    def _resized(
        self, graph: GraphBuilder, path: str, x: ir.Value, length: ir.Value, part: float
    ) -> ir.Value:
        """A part of ``x`` [...,D] with the length [...,1]; less than the floor stays short."""
        floor = np.array([part * (_LEAST_SQUARE * self.config.hidden_size) ** 0.5], np.float32)
        least = graph.constant(f"{path[1:].replace('/', '.')}.floor", floor)
        own = _op(graph, f"{path}/Max", _length(graph, f"{path}/projected", x), least)
        return _op(graph, f"{path}/Mul", _op(graph, f"{path}/Div", x, own), length)

    def _added(self, graph: GraphBuilder, path: str, output: ir.Value) -> ir.Value:
        """The norm of an output, as streams add it."""
        return self._norm(graph, path, graph.cast(path, output, _FLOAT))

    def _norm(self, graph: GraphBuilder, path: str, x: ir.Value) -> ir.Value:
        weight = self.array(f"{path[1:].replace('/', '.')}.weight")
        return graph.norm(path, x, weight, self.epsilon)


def _op(graph: GraphBuilder, name: str, x: ir.Value, other: ir.Value) -> ir.Value:
    """A node of two values, the operator being the last part of its name."""
    return graph.op(name, name.rpartition("/")[2], [x, other], dtype=_FLOAT)


def _sum(graph: GraphBuilder, path: str, x: ir.Value, added: ir.Value) -> ir.Value:
    return _op(graph, f"{path}/Add", x, added)


def _times(graph: GraphBuilder, path: str, x: ir.Value, factor: float) -> ir.Value:
    name = f"{path[1:].replace('/', '.')}.factor"
    return _op(graph, f"{path}/Mul", x, graph.constant(name, np.array([factor], np.float32)))


def _product(graph: GraphBuilder, path: str, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """The product with a large matrix, which computes in the compute dtype."""
    return graph.cast(path, graph.linear(path, x, weight), _FLOAT)


def _stream(graph: GraphBuilder, path: str, streams: ir.Value, number: int) -> ir.Value:
    """One stream [B,T,D] out of [B,T,4,D]."""
    index = graph.constant(f"{path[1:].replace('/', '.')}.stream", np.array(number))
    return graph.op(f"{path}/Gather", "Gather", [streams, index], {"axis": 2}, dtype=_FLOAT)


def _length(graph: GraphBuilder, path: str, x: ir.Value) -> ir.Value:
    """The root of the sum of squares, [...,D] -> [...,1]."""
    axis = graph.constant(f"{path[1:].replace('/', '.')}.length.axis", np.array([-1]))
    return graph.op(f"{path}/ReduceL2", "ReduceL2", [x, axis], {"keepdims": 1}, dtype=_FLOAT)


def _unsqueezed(graph: GraphBuilder, path: str, x: ir.Value, axis: int) -> ir.Value:
    place = graph.constant(f"{path[1:].replace('/', '.')}.axis", np.array([axis]))
    return graph.op(f"{path}/Unsqueeze", "Unsqueeze", [x, place], dtype=_FLOAT)


def _reshaped(graph: GraphBuilder, path: str, x: ir.Value, sizes: list[int]) -> ir.Value:
    """``x`` [B,T,n] as [B,T,*sizes]."""
    shape = graph.constant(f"{path[1:].replace('/', '.')}.shape", np.array([0, 0, *sizes]))
    return graph.op(f"{path}/Reshape", "Reshape", [x, shape], dtype=_FLOAT)
