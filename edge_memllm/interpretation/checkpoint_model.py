"""A checkpoint behind the face of a loaded model: torch computes, and the network gives the rows.

So perplexity, tasks and gains are measured on it as on an artifact, without rounding. A
composition root, for the same reason as `subject`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm import __version__
from edge_memllm.errors import ArtifactError
from edge_memllm.interpretation.network_records import NetworkRecords
from edge_memllm.manifest import GraphSpec, Manifest, ModelSpec, TableSpec
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.tokenization import Tokenizer

if TYPE_CHECKING:
    from edge_memllm.interpretation.network_memory import NetworkMemory

_TOKENIZER = "tokenizer.json"
_OPSET = 0  # of no graph


@dataclass(frozen=True)
class CheckpointModel:
    """See `edge_memllm.predictor.Predictor`; its manifest names no files."""

    manifest: Manifest
    runtime: Runtime
    table: NetworkRecords
    tokenizer: Tokenizer
    memory: NetworkMemory
    prefill_chunk: int = 256


def open_checkpoint(path: Path) -> CheckpointModel:
    """Open the folder of a checkpoint that has a tokenizer; its weights stay mapped.

    Raises `ArtifactError` without a tokenizer, `ExportError` for a checkpoint that cannot be read.
    """
    import torch

    from edge_memllm.interpretation.network_memory import NetworkMemory
    from edge_memllm_export.checkpoint import Checkpoint
    from edge_memllm_export.exporter import model_spec
    from edge_memllm_runtimes.torch_reference import TorchReference

    source = Checkpoint.open(path)
    if not (path / _TOKENIZER).is_file():
        raise ArtifactError(
            f"{path}: no {_TOKENIZER}, so tokens have no text. Put the tokenizer there."
        )
    network = source.network()
    memory = NetworkMemory(network)
    records = NetworkRecords(memory)
    return CheckpointModel(
        manifest=_manifest(model_spec(source, source.identity()), records),
        runtime=TorchReference(network, torch.float32),
        table=records,
        tokenizer=Tokenizer((path / _TOKENIZER).read_bytes()),
        memory=memory,
    )


def _manifest(model: ModelSpec, records: NetworkRecords) -> Manifest:
    """That of the artifact which would store nothing coarser than it is computed."""
    layout = records.layout
    table = TableSpec(
        file="",
        codec=layout.codec.id,
        embedding_dtype=layout.embedding_dtype,
        record_bytes=layout.record_bytes,
        stride=layout.stride,
        alignment=layout.alignment,
        records_offset=0,
        checksums_sha256="",
        parameters_sha256=None,
        classes=None,
    )
    wire = layout.codec.wire
    graph = GraphSpec("", None, "fp32", "float32", "float32", wire, _OPSET)
    return Manifest(model, table, graph, {}, f"edge-memllm {__version__}")
