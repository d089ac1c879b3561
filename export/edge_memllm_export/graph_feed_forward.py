"""FFN-C, the feed-forward part that works on the residual stream (Flex-MemoryLLM and dense).

swiglu:  x -- gate_up_proj --+-- silu --+
                             |          * --> down_proj --> y
                             +----------+
linear:  x -- projections.0 [-- projections.1] --> y
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_memllm_export.graph_tape import GraphTape


def swiglu(tape: GraphTape, path: str, x: ir.Value, weights: dict[str, np.ndarray]) -> ir.Value:
    """``down(silu(gate(x)) * up(x))`` with gate and up in one product; [B,T,D] -> [B,T,D]."""
    width = len(weights["gate_proj"])
    both = np.concatenate([weights["gate_proj"], weights["up_proj"]])
    wide = tape.linear(f"{path}/gate_up_proj", x, both)
    parts = tape.constant(f"{path[1:].replace('/', '.')}.parts", np.array([width, width]))
    gate, up = tape.op_outputs(
        f"{path}/Split",
        "Split",
        [wide, parts],
        [f"{path}/gate", f"{path}/up"],
        {"axis": -1},
        domain="",
    )
    sigmoid = tape.op(f"{path}/act_fn/Sigmoid", "Sigmoid", [gate])
    silu = tape.op(f"{path}/act_fn/Mul", "Mul", [gate, sigmoid])
    product = tape.op(f"{path}/Mul", "Mul", [silu, up])
    return tape.linear(f"{path}/down_proj", product, weights["down_proj"])


def linear_compute(
    tape: GraphTape, path: str, x: ir.Value, projections: list[np.ndarray]
) -> ir.Value:
    """One or two matrices with nothing in between; [B,T,D] -> [B,T,D]."""
    for number, weight in enumerate(projections):
        x = tape.linear(f"{path}/projections.{number}", x, weight)
    return x
