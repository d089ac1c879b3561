"""Nodes and weights of a graph, recorded by onnx-ir and named after the network's module paths.

It knows operators and number formats; which operators make an attention or a feed-forward block
is the business of the modules that call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_memllm.errors import ExportError
from edge_memllm_export.weights.quantizer import CHUNK_WEIGHTS
from edge_memllm_export.weights.stored_matrix import Blocks, BlockSums, StoredMatrix, StoreMatrix

CONTRIB = "com.microsoft"
DATA_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
}


class GraphBuilder:
    """Nodes and initialisers of one graph, in the order they are made.

    Activations are of ``compute_dtype``; ``store`` says how each matrix is stored.
    """

    def __init__(self, compute_dtype: str, store: StoreMatrix) -> None:
        self.compute_dtype = compute_dtype
        self._store = store
        self._tape = ir.tape.Tape()
        self._sums: dict[tuple[str, int], ir.Value] = {}

    def op(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        dtype: str | None = None,
    ) -> ir.Value:
        """One node with one output, of the compute dtype unless said otherwise."""
        output = ir.val(f"{name}/output_0", dtype=DATA_TYPES[dtype or self.compute_dtype])
        return self._tape.op(op_type, inputs, attributes, domain=domain, name=name, output=output)

    def op_outputs(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[str],
        attributes: Mapping[str, Any],
        *,
        domain: str = CONTRIB,
        dtypes: Sequence[str] | None = None,
    ) -> list[ir.Value]:
        """One node with several outputs; an output named "" is left out."""
        kinds = dtypes or [self.compute_dtype] * len(outputs)
        pairs = zip(outputs, kinds, strict=True)
        values = [ir.val(output, dtype=DATA_TYPES[kind]) for output, kind in pairs]
        self._tape.op_multi_out(
            op_type, inputs, attributes, outputs=values, domain=domain, name=name
        )
        return values

    def graph(
        self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], opset: int
    ) -> ir.Graph:
        """Everything recorded, as a graph between these inputs and outputs."""
        return ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": opset, CONTRIB: 1},
            name="edge_memllm",
        )

    def recorded(self) -> tuple[list[ir.Node], list[ir.Value]]:
        """Nodes and initialisers so far, for a graph that exists already."""
        return list(self._tape.nodes), list(self._tape.initializers)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initialiser, stored as it is."""
        return self._tape.initializer(ir.tensor(array, name=name))

    def vector(self, name: str, array: np.ndarray, dtype: str | None = None) -> ir.Value:
        """A small weight, stored in the compute dtype unless said otherwise."""
        kind = dtype or self.compute_dtype
        _require_finite(name, array, kind)
        return self.constant(name, array.astype(kind))

    def cast(self, path: str, x: ir.Value, dtype: str) -> ir.Value:
        """``x`` in another float type; itself where it has that one."""
        if self.type_of(x) == dtype:
            return x
        return self.op(f"{path}/Cast", "Cast", [x], {"to": DATA_TYPES[dtype]}, dtype=dtype)

    def type_of(self, x: ir.Value) -> str:
        """The dtype of a value, as a word."""
        return next(word for word, kind in DATA_TYPES.items() if kind == x.dtype)

    def linear(self, path: str, x: ir.Value, weight: np.ndarray) -> ir.Value:
        """``x [..., K] @ weight [N, K].T``, the weight as it is stored."""
        name = f"{path[1:].replace('/', '.')}.weight"
        stored = self._store(name, weight)
        if stored is None:
            return self._float_linear(path, name, x, weight)
        if len(stored) == 1:
            return self._product(path, name, x, stored[0])
        rows = [
            self._product(f"{path}/rows.{place}", f"{name}.rows.{place}", x, each)
            for place, each in enumerate(stored)
        ]
        return self.op(f"{path}/Concat", "Concat", rows, {"axis": -1})

    def _product(self, path: str, name: str, x: ir.Value, matrix: StoredMatrix) -> ir.Value:
        """The products with a matrix's parts, added up."""
        if matrix.sums is not None:
            x = self._with_sums(x, matrix.sums, matrix.columns)
        first, *others = matrix.parts
        total = self._blocks_product(path, name, x, first, matrix.level)
        for place, part in enumerate(others, start=1):
            below = f"{path}/part.{place}"
            found = self._blocks_product(below, f"{name}.part.{place}", x, part, matrix.level)
            total = self.op(f"{below}/Add", "Add", [total, found])
        return total

    def _blocks_product(
        self, path: str, name: str, x: ir.Value, blocks: Blocks, level: int
    ) -> ir.Value:
        inputs = [x, self.constant(f"{name}_codes", blocks.codes)]
        inputs.append(self.constant(f"{name}_scales", blocks.scales))
        if blocks.zeros is not None:
            inputs.append(self.constant(f"{name}_zeros", blocks.zeros))
        attributes = {
            "K": blocks.columns,
            "N": len(blocks.codes),
            "bits": blocks.bits,
            "block_size": blocks.block,
            "accuracy_level": level,
        }
        return self.op(f"{path}/MatMulNBits", "MatMulNBits", inputs, attributes, domain=CONTRIB)

    def _with_sums(self, x: ir.Value, sums: BlockSums, columns: int) -> ir.Value:
        """The inputs, of which there are ``columns``, and their sums side by side; once each x."""
        block, copies = sums
        path = f"{x.name}/sums.{block}"
        if (path, copies) not in self._sums:
            parts = [x, *[self._block_sums(path, x, block, columns // block)] * copies]
            self._sums[path, copies] = self.op(
                f"{path}/Concat.{copies}", "Concat", parts, {"axis": -1}
            )
        return self._sums[path, copies]

    def _block_sums(self, path: str, x: ir.Value, block: int, count: int) -> ir.Value:
        """Sums of the ``count`` blocks of the last axis; once for each x."""
        if (path, 0) not in self._sums:
            # Spelt out: a length of -1 cannot be told where no position reaches the head.
            sizes = np.array([0, 0, count, block])
            shape = self._shared(f"model.sums.shape.{block}", sizes, count)
            apart = self.op(f"{path}/Reshape", "Reshape", [x, shape])
            axis = self._shared("model.sums.axis", np.array([-1]), 0)
            self._sums[path, 0] = self.op(
                f"{path}/ReduceSum", "ReduceSum", [apart, axis], {"keepdims": 0}
            )
        return self._sums[path, 0]

    def _shared(self, name: str, numbers: np.ndarray, key: int) -> ir.Value:
        """A few integers that several nodes read."""
        if (name, key) not in self._sums:
            self._sums[name, key] = self.constant(f"{name}.{key}" if key else name, numbers)
        return self._sums[name, key]

    def norm(
        self, path: str, x: ir.Value, weight: np.ndarray, epsilon: float, filled: float = 1.0
    ) -> ir.Value:
        """RMSNorm of ``x``, over the part ``filled`` of its last axis; the rest of it is zero."""
        name = f"{path[1:].replace('/', '.')}.weight"
        weight = weight if filled == 1 else weight * filled**0.5
        scale = self.vector(name, weight, self.type_of(x))
        return self.norm_by(path, x, scale, epsilon * filled)

    def norm_by(self, path: str, x: ir.Value, scale: ir.Value, epsilon: float) -> ir.Value:
        """RMSNorm of ``x`` by weights that are a value, [last axis]."""
        attributes = {"axis": -1, "epsilon": epsilon}
        name, kind = f"{path}/RMSNormalization", self.type_of(x)
        return self.op(name, "RMSNormalization", [x, scale], attributes, dtype=kind)

    def add_norm(
        self, path: str, x: ir.Value, skip: ir.Value | None, weight: np.ndarray, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """RMSNorm of ``x + skip``, and the sum itself; without ``skip``, of ``x``, and ``x``."""
        if skip is None:
            return self.norm(path, x, weight, epsilon), x
        name, kind = f"{path}/SkipSimplifiedLayerNormalization", self.type_of(x)
        normed, _, _, total = self.op_outputs(
            name,
            "SkipSimplifiedLayerNormalization",
            [x, skip, self.vector(f"{path[1:].replace('/', '.')}.weight", weight, kind)],
            [f"{name}/output_0", "", "", f"{name}/output_3"],
            {"epsilon": epsilon},
            dtypes=[kind] * 4,
        )
        return normed, total

    def _float_linear(self, path: str, name: str, x: ir.Value, weight: np.ndarray) -> ir.Value:
        dtype = self.compute_dtype
        _require_finite(name, weight, dtype)
        # Lazy: the transposed copy of one matrix at a time is alive, while the graph is saved.
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(weight.T.astype(dtype)), name=name),
            dtype=DATA_TYPES[dtype],
            shape=ir.Shape(weight.T.shape),
            name=name,
        )
        return self.op(f"{path}/MatMul", "MatMul", [x, self._tape.initializer(tensor)])


def graph_input(name: str, dtype: str, shape: list[str | int]) -> ir.Value:
    """An input of a graph; sizes that are only known in a step are letters."""
    return ir.val(name, dtype=DATA_TYPES[dtype], shape=shape)


def _require_finite(name: str, weight: np.ndarray, dtype: str) -> None:
    """Raise ExportError for a value that is no number in `dtype`; looks at some rows at a time."""
    limit = np.finfo(dtype).max
    step = max(1, CHUNK_WEIGHTS // max(1, weight[:1].size))
    for start in range(0, len(weight), step):
        if not (np.abs(weight[start : start + step].astype(np.float32)) <= limit).all():
            raise ExportError(
                f"{name}: a value is not finite in {dtype}. Mend the checkpoint, or export with "
                "graph weights fp32 if it is only too large for float16."
            )
