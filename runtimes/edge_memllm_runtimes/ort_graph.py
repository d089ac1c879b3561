"""What a runtime must know of a graph before running it, and whether it fits its manifest.

Refuses a graph of another model, one that takes weights from files it should not, and one whose
inputs and outputs are not those of the format. Runs nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from edge_memllm.codecs import get_codec
from edge_memllm.errors import ArtifactError
from edge_memllm_runtimes.graph_file import GraphReferences, read_references

if TYPE_CHECKING:
    from edge_memllm.artifact import Artifact
    from edge_memllm.manifest import Manifest

_STEP_INPUTS = ("token_index", "embedding", "logits_index", "seqlens_k", "total_sequence_length")
_WIRE_INPUTS = {
    "none": (),
    "f32": ("memory_rows", "memory_gain"),
    "f16": ("memory_rows", "memory_gain"),
    "q8": ("memory_codes", "memory_scales", "memory_gain"),
    "q4": ("memory_codes", "memory_scales", "memory_gain"),
}
_EXPORT_AGAIN = "Graph and table are from different exports; export again."


@dataclass(frozen=True, slots=True)
class GraphShape:
    """The sizes that buffers are made from."""

    layers: int
    vocab_size: int
    kv_heads: int
    head_width: int
    context: int
    dtype: np.dtype[Any]  # of logits and gains
    kv_dtype: np.dtype[Any]  # of keys and values
    memory_gain: tuple[float, ...]  # one per layer with memory

    def cache_shape(self, batch: int, capacity: int) -> tuple[int, int, int, int]:
        """Return the shape of one layer's keys, or values: [B, Hk, C, d]."""
        return (batch, self.kv_heads, capacity, self.head_width)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """Return the bytes of keys and values of all layers."""
        one = math.prod(self.cache_shape(batch, capacity))
        return 2 * self.layers * one * self.kv_dtype.itemsize


def cache_names(layers: int) -> list[str]:
    """Return the names of all keys and values, without the word for past or present."""
    return [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def check_references(artifact: Artifact) -> None:
    """Raise `ArtifactError` unless the graph file is of the manifest's model and self-contained.

    Weights may lie in the one file that the manifest names for them, and nowhere else.
    """
    spec, identity = artifact.manifest.graph, artifact.manifest.model.identity
    size = artifact.manifest.files[spec.file].bytes
    with os.fdopen(artifact.open_file(spec.file), "rb") as file:
        check_graph_file(file, size, artifact.path / spec.file, spec.external_data, identity)


def check_graph_file(
    file: BinaryIO, size: int, where: Path, external_data: str | None, identity: str
) -> GraphReferences:
    """Raise `ArtifactError` unless an open graph is of the model `identity` and self-contained.

    Weights may lie in the file `external_data` beside it, and nowhere else. Returns what the
    graph refers to.
    """
    try:
        found = read_references(file, size)
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from error
    if outside := found.external_files - {external_data}:
        raise ArtifactError(
            f"{where}: takes weights from {sorted(outside)[0]!a}, expected "
            f"{external_data or 'none from outside'}. Do not use this artifact."
        )
    theirs = found.metadata.get("edge_memllm.identity", "none")
    if theirs != identity:
        raise ArtifactError(
            f"{where}: graph and manifest are of different models, {_short(theirs)} and "
            f"{_short(identity)}. {_EXPORT_AGAIN}"
        )
    return found


def read_shape(session: Any, manifest: Manifest, where: str) -> GraphShape:
    """Return the sizes of a session's graph; raises `ArtifactError` if the manifest's differ."""
    model = manifest.model
    names = cache_names(model.num_hidden_layers)
    inputs = {node.name: node.shape for node in session.get_inputs()}
    outputs = [node.name for node in session.get_outputs()]
    past = [f"past_key_values.{name}" for name in names]
    wire = get_codec(manifest.table.codec).wire
    _expect_names(where, "inputs", inputs, (*_STEP_INPUTS, *_WIRE_INPUTS[wire], *past))
    _expect_names(where, "outputs", outputs, ("logits", *(f"present.{name}" for name in names)))
    _, kv_heads, _, head_width = inputs[past[0]]
    if (kv_heads, head_width) != (model.num_key_value_heads, model.head_dim):
        raise ArtifactError(
            f"{where}: the graph's keys have {kv_heads} heads of {head_width}, the manifest says "
            f"{model.num_key_value_heads} of {model.head_dim}. {_EXPORT_AGAIN}"
        )
    return GraphShape(
        layers=model.num_hidden_layers,
        vocab_size=model.vocab_size,
        kv_heads=kv_heads,
        head_width=head_width,
        context=model.max_position_embeddings,
        dtype=np.dtype(manifest.graph.compute_dtype),
        kv_dtype=np.dtype(manifest.graph.kv_dtype),
        memory_gain=model.memory_gain if model.memory_layers else (),
    )


def _expect_names(where: str, what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    extra, missing = set(found) - set(expected), set(expected) - set(found)
    if extra or missing:
        lists = [
            f"{word} {', '.join(sorted(names))}"
            for word, names in (("unexpected", extra), ("missing", missing))
            if names
        ]
        raise ArtifactError(
            f"{where}: the graph's {what} differ: {'; '.join(lists)}. {_EXPORT_AGAIN}"
        )


def _short(identity: str) -> str:
    return identity.removeprefix("sha256:")[:12]
