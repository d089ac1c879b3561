"""Operators of edge-memllm-kernels, each alone in a session of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]

DOMAIN = "edge_memllm"


def registered(threads: int = 1) -> onnxruntime.SessionOptions:
    """Options of a session that has the operators; from here on they use what is allowed now."""
    import edge_memllm_kernels  # a package of its own, which may not be there

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(edge_memllm_kernels.library()))
    return options


class Operator:
    """One operator: its inputs are given when it runs, or are constants."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Mapping[str, Any],
        *,
        given: Mapping[str, Any],
        constants: Mapping[str, Array] | None = None,
        threads: int = 1,
        **attributes: int | float,
    ) -> None:
        """An empty name among the inputs is one that is left out.

        Args:
            name: of the operator.
            inputs: names of all inputs, in their order.
            outputs: dtypes by names.
            given: dtypes of the inputs that are not constants.
            constants: the others.
            threads: that work at once.
            attributes: of the operator.
        """
        node = helper.make_node(name, inputs, list(outputs), domain=DOMAIN, **attributes)
        weights = [numpy_helper.from_array(each, key) for key, each in (constants or {}).items()]
        graph = helper.make_graph([node], "one", _values(given), _values(outputs), weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), registered(threads), providers=["CPUExecutionProvider"]
        )

    def __call__(self, **feeds: Array) -> list[Array]:
        return list(self._session.run(None, feeds))


def _values(dtypes: Mapping[str, Any]) -> list[onnx.ValueInfoProto]:
    """Tensors of any shape."""
    types = {key: helper.np_dtype_to_tensor_dtype(np.dtype(each)) for key, each in dtypes.items()}
    return [helper.make_tensor_value_info(key, each, None) for key, each in types.items()]
