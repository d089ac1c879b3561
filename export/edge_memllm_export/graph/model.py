"""The whole graph of a model as ONNX: built in a form, and saved.

What is computed is the family's; here is what all graphs have: inputs, outputs, versions, files.
Nothing here knows files of checkpoints or torch: weights arrive as arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.codecs import Codec
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.step import KVScales, StepInputs, step_inputs
from edge_memllm_export.weights.quantizer import compute_dtype, uniform
from edge_memllm_export.weights.stored_matrix import StoreMatrix

OPSET = 23
GRAPH_FILE = "graph.onnx"
EXTERNAL_FILE = "graph.onnx.data"
_IR_VERSION = 11  # the version that came with opset 23
# Weights in a file of their own are mapped into memory, so that the copy the runtime packs for
# itself is the only one: 0.3 GB less for a graph of that size. Small graphs stay in one file.
_SELF_CONTAINED_BYTES = 16 << 20

BuildGraph = Callable[[GraphBuilder, StepInputs], ir.Value]


@dataclass(frozen=True)
class GraphForm:
    """How numbers are stored and computed: the export's choices, not the network's."""

    weights: str  # of manifest.GRAPH_WEIGHTS
    codec: Codec
    embedding_dtype: str  # "float16" | "float32", that of the table's records
    block: int | None = None  # weights to a scale in a matrix; None chooses by its size
    kv_dtype: str | None = None  # of keys and values; None: the compute dtype
    matrices: Mapping[str, str] = field(default_factory=dict)  # kinds in another form than weights
    rounded: float = 0.0  # nats that inputs rounded to 8 bits may cost beside grids that are kept
    method: str | None = None  # one of quantizer.METHODS; None where nothing is quantised


def build_graph(
    spec: ModelSpec,
    build: BuildGraph,
    form: GraphForm,
    identity: str,
    kv_scales: Sequence[KVScales] | None = None,
    store: StoreMatrix | None = None,
) -> ir.Model:
    """The graph of the model that ``spec`` and ``build`` describe (see Architecture).

    ``kv_scales``, one for each cache, are for keys and values in int8; ``store`` is called layer
    by layer, the head last, None rounds to nearest. Inputs and outputs are listed in
    docs/format.md. Raises ExportError for weights that the form cannot hold.
    """
    graph = GraphBuilder(
        compute_dtype(form.weights), store or uniform(form.weights, form.block, form.matrices)
    )
    scales = None
    if kv_scales is not None:
        layers = [cache.layer for cache in spec.caches]
        scales = dict(zip(layers, kv_scales, strict=True))
    step = step_inputs(
        graph, spec, form.codec, form.embedding_dtype, form.kv_dtype or graph.compute_dtype, scales
    )
    logits = build(graph, step)
    logits.name = "logits"
    whole = graph.graph(step.inputs, [logits, *step.outputs], OPSET)
    model = ir.Model(whole, ir_version=_IR_VERSION, producer_name="edge-memllm")
    model.metadata_props["edge_memllm.format_version"] = "1"
    model.metadata_props["edge_memllm.identity"] = identity
    return model


def save_graph(
    model: ir.Model, folder: Path, self_contained_bytes: int = _SELF_CONTAINED_BYTES
) -> list[str]:
    """Write ``graph.onnx`` into the folder; weights beyond 16 MB go to one file beside it.

    Returns the names of the files written.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size <= self_contained_bytes:
        ir.save(model, folder / GRAPH_FILE)
        return [GRAPH_FILE]
    ir.save(model, folder / GRAPH_FILE, external_data=EXTERNAL_FILE, alignment=4096)
    return [GRAPH_FILE, EXTERNAL_FILE]
