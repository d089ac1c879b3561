"""Which form each matrix of a graph is stored in: one for all, others for kinds of matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edge_memllm.errors import ExportError

# Graph weights -> (dtype of all activations, bits of a quantised matrix or None).
# float16 activations are the one form that runs on CPU and CUDA alike.
WEIGHT_FORMS: dict[str, tuple[str, int | None]] = {
    "int4": ("float16", 4),
    "int8": ("float16", 8),
    "fp16": ("float16", None),
    "fp32": ("float32", None),
}
METHODS = ("rtn", "gptq")
# Rounding to 8 bits costs hundredths of a per cent as it is.
_DEFAULT_METHODS = {"int4": "gptq", "int8": "rtn"}

# weight [N, K], bits, block, dtype of scales, name -> codes and scales as in `quantizer`.
QuantizeMatrix = Callable[[np.ndarray, int, int, np.dtype, str], tuple[np.ndarray, np.ndarray]]


def matrix_kinds(config: Any) -> tuple[str, ...]:
    """Names that a graph of this network gives its matrices, as they lie in it."""
    if not config.has_compute:
        compute: tuple[str, ...] = ()
    elif config.compute_form == "linear":
        compute = ("projections",)
    else:
        compute = ("gate_up_proj", "down_proj")
    return ("qkv_proj", "o_proj", *compute, "lm_head")


def kind_of(path: str) -> str:
    """The kind of the matrix at a path of the graph: /model/layers.3/mlp/projections.1."""
    return path.rsplit("/", 1)[-1].split(".")[0]


def check_matrix_forms(forms: Mapping[str, str], graph_weights: str, config: Any) -> None:
    """Refuse kinds that this network's graph lacks, and forms that do not go with the main one."""
    if forms and WEIGHT_FORMS[graph_weights][1] is None:
        raise ExportError(
            f"matrix weights are for int4 and int8 graphs, the graph weights are {graph_weights}. "
            "Leave them out, or choose int4 or int8."
        )
    kinds = matrix_kinds(config)
    quantised = [form for form, (_, bits) in WEIGHT_FORMS.items() if bits is not None]
    for kind, form in forms.items():
        if kind not in kinds:
            raise ExportError(
                f"matrix weights for {kind!r}, this network's graph has {', '.join(kinds)}."
            )
        if form not in quantised:
            raise ExportError(
                f"matrix weights {form!r} for {kind}, expected {' or '.join(quantised)}."
            )


def quantisation_method(method: str | None, graph_weights: str) -> str | None:
    """The method asked for, or the form's own; None where nothing is quantised."""
    default = _DEFAULT_METHODS.get(graph_weights)
    if method is None:
        return default
    if method not in METHODS:
        raise ExportError(f"graph method {method!r}, expected one of {', '.join(METHODS)}.")
    if default is None:
        raise ExportError(
            f"graph method {method} is for quantised matrices, the graph weights are "
            f"{graph_weights}. Leave it out, or choose int4 or int8."
        )
    return method
