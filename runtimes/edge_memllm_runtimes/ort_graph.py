"""The graph of an artifact as ONNX Runtime is given it: bytes that were checked, and no path.

What was checked and is then opened again by its name may be another file by then; and what is
mapped can end the process when the file is cut short or the device fails. So the graph and its
weights are read once, into memory of our own. Runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.model_spec import CacheSpec, cache_values
from edge_memllm.errors import ArtifactError
from edge_memllm_runtimes.cpu_graph import computed_dtype, for_cpu
from edge_memllm_runtimes.graph_check import check_graph
from edge_memllm_runtimes.graph_file import DATA_TYPES, GraphFile, Tensor, read_graph
from edge_memllm_runtimes.kv_cache import ROLLING_SLACK, cache_names, reader_names, rolling_capacity

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact
    from edge_memllm.artifact.manifest import Manifest

# The most that a writer leaves between two weights, so that each begins on a page of any system.
_MAX_GAP = 1 << 16
_MAX_GRAPH_BYTES = (1 << 31) - 1  # protobuf's own limit


@dataclass(frozen=True, slots=True)
class GraphShape:
    """The sizes that buffers are made from."""

    vocab_size: int
    caches: tuple[CacheSpec, ...]
    context: int
    dtype: np.dtype[Any]  # of logits and gains
    kv_dtype: np.dtype[Any]  # of keys and values
    memory_gain: tuple[float, ...]  # one per layer, none without token memory
    keeps_less: bool  # whether some layers have no keys and values of their own
    rewritten: tuple[tuple[str, str], ...]  # outputs that are in the place of a cache, int8 alone
    slack: int  # rows of rolling caches beyond their windows

    @classmethod
    def of(cls, manifest: Manifest, device: str, *, own_dtype: bool = False) -> GraphShape:
        """Return the sizes of the graph that a device computes; see `computed_dtype`."""
        model = manifest.model
        return cls(
            vocab_size=model.vocab_size,
            caches=model.caches,
            context=model.max_position_embeddings,
            dtype=np.dtype(computed_dtype(manifest, device, own_dtype=own_dtype)),
            kv_dtype=np.dtype(manifest.graph.kv_dtype),
            memory_gain=model.memory.gain,
            keeps_less=len(model.caches) < model.num_hidden_layers,
            rewritten=tuple(_rewritten(model.caches) if manifest.graph.kv_dtype == "int8" else ()),
            slack=ROLLING_SLACK if device == "cpu" else 0,  # CUDA's operator takes no more rows
        )

    def rolling_rows(self, cache: CacheSpec) -> int | None:
        """Return the rows of a rolling cache, R; None for one that grows with the text."""
        if not cache.rolling or cache.window is None:
            return None
        return rolling_capacity(cache.window, self.context, self.slack)

    def cache_shapes(self, batch: int, capacity: int) -> dict[str, tuple[int, int, int, int]]:
        """Return the shapes [B, Hk, C or R, d] of all keys and values, by `cache_names`."""
        return {
            name: (batch, cache.kv_heads, self.rolling_rows(cache) or capacity, cache.head_dim)
            for cache in self.caches
            for name in cache_names(cache)
        }

    def cache_bytes(self, capacity: int) -> int:
        """Return the bytes of all keys and values of one sequence."""
        values = sum(
            cache_values([cache]) * (self.rolling_rows(cache) or capacity) for cache in self.caches
        )
        return values * self.kv_dtype.itemsize


def _rewritten(caches: Iterable[CacheSpec]) -> Iterator[tuple[str, str]]:
    """Yield what readers of caches call keys and values, and what `cache_names` calls them."""
    for cache in caches:
        yield from zip(reader_names(cache), cycle(cache_names(cache)), strict=False)


@dataclass(frozen=True, slots=True)
class CheckedGraph:
    """The bytes of a graph file, and the weights that it takes from the file beside it."""

    where: Path
    content: bytes
    weights: dict[str, NDArray[Any]]


def read_checked_graph(artifact: Artifact, *, own: bool = False) -> CheckedGraph:
    """Read the artifact's graph and its weights into memory, checked.

    With ``own``, which says that nobody else can change its files, weights are mapped. Raises as
    `check_artifact_graph` does, `CorruptionError` also for weights that the manifest does not
    promise.
    """
    spec = artifact.manifest.graph
    content, graph = check_artifact_graph(artifact)
    weights = {}
    if spec.external_data is not None:
        read = artifact.map_checked if own else artifact.read_checked
        data = read(spec.external_data)
        weights = {
            each.name: np.frombuffer(
                data, DATA_TYPES[each.data_type], math.prod(each.dims), each.start
            ).reshape(each.dims)
            for each in graph.tensors.values()
            if each.outside is not None
        }
    return CheckedGraph(artifact.path / spec.file, content, weights)


def rewritten(
    graph: CheckedGraph, *, floats: bool, input_bits: Collection[int] = ()
) -> CheckedGraph:
    """Return the graph as a CPU computes it; see `cpu_graph`."""
    found = for_cpu(graph.content, floats=floats, input_bits=input_bits)
    weights = graph.weights | {
        name: graph.weights[name].astype(np.float32) for name in found.widened
    }
    return replace(graph, content=found.content, weights=weights)


def check_artifact_graph(artifact: Artifact) -> tuple[bytes, GraphFile]:
    """Return the bytes of the artifact's graph file and what they say, weights beside it unread.

    Raises `CorruptionError` for bytes that the manifest does not promise, `ArtifactError` for a
    graph of another model, one that our exporter does not write (see `graph_check`) and one that
    takes weights from any file but the manifest's.
    """
    manifest, spec = artifact.manifest, artifact.manifest.graph
    where, size = artifact.path / spec.file, manifest.files[spec.file].bytes
    if size > _MAX_GRAPH_BYTES:
        raise ArtifactError(
            f"{where}: {size:,} bytes, a graph has at most {_MAX_GRAPH_BYTES:,}, its weights "
            "beside it. Export the model again."
        )
    content = artifact.read_bytes(spec.file)
    graph = check_graph_file(content, where, spec.external_data, manifest.model.identity)
    try:
        check_graph(graph, content, manifest)
        if spec.external_data is not None:
            outside = [each for each in graph.tensors.values() if each.outside is not None]
            _check_places(outside, manifest.files[spec.external_data].bytes)
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from error
    return content, graph


def check_graph_file(
    data: bytes, where: Path, external_data: str | None, identity: str, *, rewritten: bool = False
) -> GraphFile:
    """Raise `ArtifactError` unless a graph is of the model `identity` and self-contained.

    Weights may lie in the file `external_data` beside it, and nowhere else. Returns what the
    graph says; of one that was `rewritten` for a processor without its branches.
    """
    try:
        found = read_graph(data, rewritten=rewritten)
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
            f"{_short(identity)}. Graph and table are from different exports; export again."
        )
    return found


def _check_places(weights: Iterable[Tensor], size: int) -> None:
    """Raise `ArtifactError` unless weights lie one behind the other and fill their file."""
    end = 0
    for each in sorted(weights, key=lambda each: (each.start, each.size)):
        aligned = each.start % np.dtype(DATA_TYPES[each.data_type]).itemsize == 0
        if not (end <= each.start <= end + _MAX_GAP and aligned):
            raise ArtifactError(
                f"not a graph of this format: {each.name!a:.80} begins at {each.start} of its "
                f"file, the weights before it end at {end}. Do not use this artifact."
            )
        end = each.start + each.size
    if not end <= size <= end + _MAX_GAP:
        raise ArtifactError(
            f"not a graph of this format: its weights end at {end} of a file of {size} bytes. "
            "Copy the artifact again."
        )


def _short(identity: str) -> str:
    return identity.removeprefix("sha256:")[:12]
