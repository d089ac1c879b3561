"""The bytes of weights that a graph reads for each token it decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_memllm.artifact import Artifact

# Angles by position: a step takes one row of them.
_BY_POSITION = {"cos_cache", "sin_cache"}


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of all weights of the graph, as stored.

    Neither the table nor an embedding is in the graph, so every weight is read once per step.
    """
    from edge_memllm_runtimes.graph_file import read_graph

    graph = read_graph(artifact.read_bytes(artifact.manifest.graph.file))
    tensors = graph.tensors.values()
    return sum(each.size for each in tensors if each.name not in _BY_POSITION)
