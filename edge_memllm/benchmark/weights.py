"""The bytes of weights that a graph reads for each token it decodes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_memllm.artifact import Artifact

_MODEL_GRAPH, _GRAPH_TENSOR = 7, 5  # field numbers of onnx.proto
_TENSOR_NAME, _TENSOR_DATA, _TENSOR_EXTERNAL = 8, 9, 13
# Angles by position: a step takes one row of them.
_BY_POSITION = {"cos_cache", "sin_cache"}


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of all weights of the graph, as stored.

    Neither the table nor an embedding is in the graph, so every weight is read once per step.
    """
    spec = artifact.manifest.graph
    size = artifact.manifest.files[spec.file].bytes
    with os.fdopen(artifact.open_file(spec.file), "rb") as file:
        sizes = dict(_tensors(file, size))
    return sum(count for name, count in sizes.items() if name not in _BY_POSITION)


def _tensors(file: BinaryIO, size: int) -> Iterator[tuple[str, int]]:
    """Yield name and bytes of every initialiser of an ONNX file."""
    for graph in _fields(file, (0, size), _MODEL_GRAPH):
        for tensor in _fields(file, graph, _GRAPH_TENSOR):
            yield _tensor(file, tensor)


def _tensor(file: BinaryIO, span: tuple[int, int]) -> tuple[str, int]:
    from edge_memllm_runtimes.graph_file import message_parts, text_entry

    name, count = "", 0
    for number, start, end in list(message_parts(file, *span)):
        if number == _TENSOR_NAME:
            file.seek(start)
            name = file.read(end - start).decode("utf-8", "replace")
        elif number == _TENSOR_DATA:
            count = end - start
        elif number == _TENSOR_EXTERNAL:
            key, value = text_entry(file, start, end)
            count = int(value) if key == "length" else count
    return name, count


def _fields(file: BinaryIO, span: tuple[int, int], wanted: int) -> list[tuple[int, int]]:
    from edge_memllm_runtimes.graph_file import message_parts

    return [(start, end) for number, start, end in message_parts(file, *span) if number == wanted]
