"""Gated feed-forward networks: the gate and up projections as one product, then the activation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edge_memllm_export.graph.builder import CONTRIB, GraphBuilder

_NEARLY_ZERO = 1e-12  # an epsilon where the network has none, and the operator wants one


def swiglu(
    graph: GraphBuilder,
    path: str,
    x: ir.Value,
    weights: Mapping[str, np.ndarray],
    biases: Mapping[str, np.ndarray] | None = None,
) -> ir.Value:
    """``down(silu(gate(x)) * up(x))`` with gate and up in one product; [B,T,D] -> [B,T,D].

    ``biases`` are those of gate and up.
    """
    gate, up = _gate_and_up(graph, path, x, weights, biases)
    sigmoid = graph.op(f"{path}/act_fn/Sigmoid", "Sigmoid", [gate])
    silu = graph.op(f"{path}/act_fn/Mul", "Mul", [gate, sigmoid])
    product = graph.op(f"{path}/Mul", "Mul", [silu, up])
    return graph.linear(f"{path}/down_proj", product, weights["down_proj"])


def geglu(
    graph: GraphBuilder,
    path: str,
    x: ir.Value,
    weights: Mapping[str, np.ndarray],
    deviations: float | None = None,
) -> ir.Value:
    """``down(gelu(gate(x)) * up(x))``, GELU in its form with tanh; [B,T,D] -> [B,T,D].

    With ``deviations`` the gate is sparse: of each number remains what lies above the mean of all
    by more than so many standard deviations.
    """
    both = np.concatenate([weights["gate_proj"], weights["up_proj"]])
    wide = graph.linear(f"{path}/gate_up_proj", x, both)
    wide = graph.cast(f"{path}/gate_up_proj", wide, "float32")
    gate, up = _halves(graph, path, wide, len(both) // 2, "float32")
    if deviations is not None:
        gate = _above(graph, f"{path}/gate", gate, len(both) // 2, deviations)
    product = gated(graph, path, gate, up)
    return graph.linear(f"{path}/down_proj", product, weights["down_proj"])


def gated(graph: GraphBuilder, path: str, gate: ir.Value, x: ir.Value) -> ir.Value:
    """``gelu(gate) * x`` of two float32 values, in the compute dtype; GELU in its form with tanh.

    On a CPU the operators are there for float32 alone: GELU in float16 would be a dozen of them.
    """
    kind = "float32"
    gelu = graph.op(f"{path}/act_fn/FastGelu", "FastGelu", [gate], domain=CONTRIB, dtype=kind)
    product = graph.op(f"{path}/Mul", "Mul", [gelu, x], dtype=kind)
    return graph.cast(f"{path}/Mul", product, graph.compute_dtype)


def _above(graph: GraphBuilder, path: str, x: ir.Value, width: int, deviations: float) -> ir.Value:
    """``relu(x - (mean + deviations * std))`` over the last axis, ``width`` wide, in float32.

    A norm gives (x - mean) / std - deviations, and 1 / std besides.
    """
    name, norm, kind = path[1:].replace("/", "."), f"{path}/LayerNormalization", "float32"
    ones = graph.constant(f"{name}.ones", np.ones(width, np.float32))
    shift = graph.constant(f"{name}.shift", np.full(width, -deviations, np.float32))
    normed, _, inverse = graph.op_outputs(
        norm,
        "LayerNormalization",
        [x, ones, shift],
        [f"{norm}/output_0", "", f"{norm}/output_2"],
        {"axis": -1, "epsilon": _NEARLY_ZERO},
        domain="",
        dtypes=[kind] * 3,
    )
    kept = graph.op(f"{path}/Relu", "Relu", [normed], dtype=kind)
    return graph.op(f"{path}/Div", "Div", [kept, inverse], dtype=kind)


def _gate_and_up(
    graph: GraphBuilder,
    path: str,
    x: ir.Value,
    weights: Mapping[str, np.ndarray],
    biases: Mapping[str, np.ndarray] | None,
) -> list[ir.Value]:
    """Both projections of x, out of one product."""
    name = path[1:].replace("/", ".")
    both = np.concatenate([weights["gate_proj"], weights["up_proj"]])
    wide = graph.linear(f"{path}/gate_up_proj", x, both)
    if biases is not None:
        shifts = np.concatenate([biases["gate_proj"], biases["up_proj"]])
        bias = graph.vector(f"{name}.gate_up_proj.bias", shifts)
        wide = graph.op(f"{path}/gate_up_proj/Add", "Add", [wide, bias])
    return _halves(graph, path, wide, len(both) // 2, graph.compute_dtype)


def _halves(
    graph: GraphBuilder, path: str, wide: ir.Value, width: int, kind: str
) -> list[ir.Value]:
    """Both halves of the last axis."""
    name = f"{path[1:].replace('/', '.')}.parts"
    return graph.op_outputs(
        f"{path}/Split",
        "Split",
        [wide, graph.constant(name, np.array([width, width]))],
        [f"{path}/gate", f"{path}/up"],
        {"axis": -1},
        domain="",
        dtypes=[kind, kind],
    )
