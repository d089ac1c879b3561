"""Another wire form for a finished graph: the nodes that take in the table's rows are exchanged.

Everything from the layers on stays as it is, byte for byte; weights beside the graph are not
touched. Knows the names that `graph_rows` gives; needs no checkpoint and no torch.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from edge_memllm.codecs import Codec
from edge_memllm.errors import ArtifactError
from edge_memllm_export.graph_rows import MemoryShape, memory_rows
from edge_memllm_export.graph_tape import GraphTape
from edge_memllm_export.quantizer import quantize

_NODES = "/model/memory/"
_INITIALISERS = "model.memory."
_WIRE_INPUTS = ("memory_rows", "memory_codes", "memory_scales")


def rewire_graph(source: Path, out: Path, weights: str, shape: MemoryShape, codec: Codec) -> None:
    """Write the graph at `source` to `out`, fed in the wire form of `codec`.

    `weights` is the manifest's word for the graph's matrices. Weights outside of the file stay
    where the file says, beside it. Raises `ArtifactError` for a graph that is not the exporter's.
    """
    model = ir.load(source)
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    old = [node for node in graph if (node.name or "").startswith(_NODES)]
    if not old or not {"token_index", "memory_gain"} <= set(inputs):
        raise ArtifactError(
            f"{source}: the part that takes in the table's rows was not found. Only graphs made "
            "by 'edge-memllm export' can be changed; export the model again."
        )
    tape = GraphTape(weights, {}, None, quantize, 0.0)
    wire, memory = memory_rows(tape, shape, codec, inputs["memory_gain"], inputs["token_index"])
    nodes, initialisers = tape.recorded()
    graph.insert_before(old[0], nodes)
    for node, index in list(old[-1].outputs[0].uses()):
        node.replace_input_with(index, memory)
    graph.remove(old, safe=True)
    _replace_inputs(graph, wire)
    for name in [name for name in graph.initializers if name.startswith(_INITIALISERS)]:
        del graph.initializers[name]
    for value in initialisers:
        graph.register_initializer(value)
    ir.save(model, out)


def _replace_inputs(graph: ir.Graph, wire: list[ir.Value]) -> None:
    """Exchange the wire form's inputs, in their place among the others."""
    places = [place for place, value in enumerate(graph.inputs) if value.name in _WIRE_INPUTS]
    graph.inputs[places[0] : places[-1] + 1] = wire
