"""Which graphs are rewritten for a CPU, and what becomes of their weights."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.manifest import QUANTISED_WEIGHTS
from edge_memllm_runtimes.cpu_graph.edited import CODES, EditedGraph
from edge_memllm_runtimes.cpu_graph.floats import in_floats
from edge_memllm_runtimes.cpu_graph.kernels import fuse, take_over
from edge_memllm_runtimes.cpu_graph.prompts import attend_in_floats
from edge_memllm_runtimes.cpu_graph.windows import cut_windows

if TYPE_CHECKING:
    from edge_memllm.artifact.manifest import Manifest

# What becomes float32 of the weights beside the graph goes to another file beside it, whose name no
# manifest can give to one of its own.
FLOATS_FILE = "+floats.data"
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class CpuGraph:
    """A rewritten graph: its bytes, and what it wants of the weights beside it in float32."""

    content: bytes
    widened: tuple[str, ...]  # in the order that they have in FLOATS_FILE


def floats_of(halves: NDArray[np.float16]) -> bytes:
    """Return a weight as it lies in `FLOATS_FILE`, float32 filled up to where the next begins."""
    found = halves.astype("<f4").tobytes()
    return found + bytes(-len(found) % _ALIGNMENT)


def computed_dtype(manifest: Manifest, device: str, *, own_dtype: bool = False) -> str:
    """Return what a device computes a graph in, between operators and in logits.

    A CPU takes float32, but for weights in float16, which would take twice the memory then.
    """
    if device != "cpu" or own_dtype or manifest.graph.weights not in QUANTISED_WEIGHTS:
        return manifest.graph.compute_dtype
    return "float32"


def for_cpu(content: bytes, *, floats: bool = True, input_bits: Collection[int] = ()) -> CpuGraph:
    """Rewrite a checked graph, its dtype only with ``floats``.

    With ``input_bits``, for kernels of ours, which take products with inputs of so many bits. They
    compute in float32: a graph in another dtype takes them only together with ``floats``.
    The weights beside it stay where they are but for `widened`.
    """
    graph = EditedGraph(content)
    if input_bits:
        take_over(graph, input_bits)
    widened, place = [], 0
    for name in sorted(in_floats(graph)) if floats else ():
        tensor = graph.tensors[name]
        tensor["data_type"] = CODES["float32"]
        if "raw_data" in tensor:
            start, end = tensor["raw_data"]
            halves = np.frombuffer(content, "<f2", (end - start) // 2, start)
            tensor["raw_data"] = halves.astype("<f4").tobytes()
            continue
        size = math.prod(tensor.get("dims", ())) * 4
        entries = {"location": FLOATS_FILE, "offset": str(place), "length": str(size)}
        tensor["external_data"] = [{"key": key, "value": each} for key, each in entries.items()]
        widened.append(name)
        place += size + -size % _ALIGNMENT
    if input_bits:
        fuse(graph)
    cut_windows(graph)
    if floats:
        attend_in_floats(graph)
    return CpuGraph(graph.bytes(), tuple(widened))
