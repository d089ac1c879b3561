"""An export's options: checked against the checkpoint before anything is computed or written."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edge_memllm.codecs import get_codec
from edge_memllm.codecs.words import codec_id
from edge_memllm.errors import ExportError, RuntimeUnavailableError
from edge_memllm.mixed_precision import Target
from edge_memllm.records import RecordLayout
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.graph import GraphForm
from edge_memllm_export.matrix_forms import (
    WEIGHT_FORMS,
    check_matrix_forms,
    quantisation_method,
)
from edge_memllm_export.quantizer import BLOCKS

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def graph_form(
    source: Checkpoint,
    graph_weights: str,
    table_codec: str | None,
    graph_block: int | None = None,
    kv_dtype: str | None = None,
    graph_method: str | None = None,
    matrix_weights: Mapping[str, str] | None = None,
) -> GraphForm:
    """The form of graph and rows that these name, or an ExportError that lists what there is."""
    if graph_weights not in WEIGHT_FORMS:
        raise ExportError(
            f"graph weights {graph_weights!r}, expected one of {', '.join(WEIGHT_FORMS)}."
        )
    try:
        chosen = codec_id(table_codec or "int8", source.config.hidden_size)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if not source.config.has_memory:
        chosen = "none"
    elif chosen == "none":
        raise ExportError(
            f"table codec none is for dense models (beta 8), {source.path} has beta "
            f"{source.config.beta}. Choose a codec that stores rows."
        )
    dtype, bits = WEIGHT_FORMS[graph_weights]
    _check_block(graph_weights, bits, graph_block)
    _check_kv_dtype(graph_weights, dtype, kv_dtype)
    matrices = dict(matrix_weights or {})
    check_matrix_forms(matrices, graph_weights, source.config)
    return GraphForm(
        graph_weights,
        get_codec(chosen),
        dtype,
        graph_block,
        int8_cache=kv_dtype == "int8",
        matrices=matrices,
        method=quantisation_method(graph_method, graph_weights),
    )


def check_calibration(form: GraphForm, text: str | None) -> None:
    """Refuse a calibration text that nothing would read."""
    if text is not None and form.method != "gptq" and not form.int8_cache:
        raise ExportError(
            f"calibration text: graph weights {form.weights} by the method {form.method or 'none'} "
            "are not calibrated, nor are keys and values. Leave it out, or choose the graph method "
            "gptq or int8 keys and values."
        )


def _check_block(graph_weights: str, bits: int | None, block: int | None) -> None:
    if block is None:
        return
    if block not in BLOCKS:
        known = ", ".join(map(str, BLOCKS))
        raise ExportError(f"graph block {block}, expected one of {known}.")
    if bits is None:
        raise ExportError(
            f"graph block {block} is for quantised matrices, the graph weights are "
            f"{graph_weights}. Leave it out, or choose int4 or int8."
        )


def _check_kv_dtype(graph_weights: str, dtype: str, kv_dtype: str | None) -> None:
    if kv_dtype not in (None, dtype, "int8"):
        raise ExportError(
            f"keys and values in {kv_dtype}: graph weights {graph_weights} compute in {dtype}. "
            f"Choose {dtype} or int8."
        )
    if graph_weights == "fp32" and kv_dtype == "int8":
        raise ExportError(
            "keys and values in int8 with graph weights fp32: that form is the exact one, which "
            "the parity tests compare with. Choose fp16, int8 or int4."
        )


def record_layout(source: Checkpoint, form: GraphForm, alignment: int) -> RecordLayout:
    """The table's record layout; ExportError where width, codec and alignment do not fit."""
    config = source.config
    try:
        return RecordLayout(
            layers=config.memory_layers,
            width=config.hidden_size,
            codec=form.codec,
            embedding_dtype=form.embedding_dtype,
            alignment=alignment,
        )
    except ValueError as error:
        raise ExportError(f"{source.path}: {error}") from error


def check_target(source: Checkpoint, table_codec: str | None, target: Target | None) -> None:
    """Refuse a target in size where nothing could be chosen for it."""
    if target is None:
        return
    if table_codec is not None:
        raise ExportError(
            f"table codec {table_codec}, target {target}: expected one of the two. Name a codec, "
            "or a target in bits or bytes."
        )
    if not source.config.has_memory:
        raise ExportError(
            f"target {target}: {source.path} is a dense model (beta 8), which has no memory rows. "
            "Leave the target out."
        )


def check_computation(device: str, compute_dtype: str, chunk: int | None) -> None:
    """Refuse a way of computing rows that does not exist here."""
    if device not in ("cpu", "cuda"):
        raise ExportError(f"device {device!r}, expected cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailableError(
            "device cuda: this torch finds no CUDA device. Install a CUDA build of torch, or "
            "export on the cpu."
        )
    if compute_dtype not in COMPUTE_DTYPES:
        raise ExportError(f"compute dtype {compute_dtype!r}, expected float32 or bfloat16.")
    if chunk is not None and chunk < 1:
        raise ExportError(f"chunk is {chunk}, expected at least one token.")
