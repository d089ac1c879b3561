"""What an artifact will need on disk and in memory, told from its manifest before loading it.

Sizes are exact where the manifest states them; resident memory is an estimate, with factors
measured on ONNX Runtime's CPU provider.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_memllm.manifest import CHECKSUM_BYTES, Manifest

# Measured with ONNX Runtime 1.31 on a CPU. The interpreter with all libraries, no model:
_BASE_BYTES = 70_000_000
# Resident bytes per byte of tokenizer.json (byte-level BPE of 8 k and 60 k tokens):
_TOKENIZER_FACTOR = 14
# Resident bytes per byte of graph (85 M parameters). Low-bit matrices are repacked beside the
# originals, and float16 ones become float32 where the processor computes in that.
_GRAPH_FACTORS = {"int4": 2.1, "int8": 2.0, "fp16": 3.3, "fp32": 1.1}
_VALUE_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes, for one sequence of ``tokens`` tokens."""

    tokens: int
    disk_bytes: int
    graph_bytes: int
    table_bytes: int
    record_bytes: int
    kv_bytes: int
    resident_bytes: int  # table read from storage
    resident_bytes_with_table: int  # table in memory (--reader ram)


def footprint(manifest: Manifest, tokens: int) -> Footprint:
    """Estimate for one sequence of ``tokens`` tokens, at most the model's context."""
    from edge_memllm_runtimes.kv_cache import grown_capacity

    model, graph = manifest.model, manifest.graph
    position = model.num_key_value_heads * model.head_dim * _VALUE_BYTES[graph.compute_dtype]
    capacity = grown_capacity(tokens, model.max_position_embeddings)
    kv_bytes = 2 * model.num_hidden_layers * position * capacity
    graph_bytes = graph_file_bytes(manifest)
    records = model.vocab_size * manifest.table.stride
    tokenizer = manifest.files.get("tokenizer.json")
    resident = (
        _BASE_BYTES
        + round(graph_bytes * _GRAPH_FACTORS.get(graph.weights, max(_GRAPH_FACTORS.values())))
        + (tokenizer.bytes * _TOKENIZER_FACTOR if tokenizer else 0)
        + kv_bytes
        + model.vocab_size * CHECKSUM_BYTES
    )
    return Footprint(
        tokens=tokens,
        disk_bytes=sum(spec.bytes for spec in manifest.files.values()),
        graph_bytes=graph_bytes,
        table_bytes=manifest.files[manifest.table.file].bytes,
        record_bytes=manifest.table.record_bytes,
        kv_bytes=kv_bytes,
        resident_bytes=resident,
        resident_bytes_with_table=resident + records,
    )


def graph_file_bytes(manifest: Manifest) -> int:
    """Bytes of the graph with its external data."""
    names = (manifest.graph.file, manifest.graph.external_data)
    return sum(manifest.files[name].bytes for name in names if name is not None)
