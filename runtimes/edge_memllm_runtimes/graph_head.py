"""The last norm and the head of an artifact, read out of its graph file: no library, no session.

The exporter names them `model.norm.weight` and `lm_head.weight`; a quantised head is the codes of
one MatMulNBits or of several (`stored_matrix.py` of the exporter says how they make up a matrix), a
float one is stored transposed. Rows are read when they are asked for, so
that memory stays small however large the vocabulary is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_memllm.arrays import Bytes, Floats, Ids
from edge_memllm.checked_values import is_integer
from edge_memllm.errors import ArtifactError
from edge_memllm.readers.reader import OpenFile
from edge_memllm_runtimes.graph_file import GraphFile, Node, Tensor, read_graph

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact
    from edge_memllm.interpretation.head import Head


_NORM, _FLOAT = "model.norm.weight", "lm_head.weight"
_CODES = "_codes"
_ATTRIBUTES = ("K", "N", "bits", "block_size")


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The codes of one MatMulNBits of the head, for its rows from `start` on."""

    names: tuple[str, ...]  # of codes, scales and maybe zero points
    start: int
    rows: int
    columns: int
    bits: int
    block: int


class GraphHead:
    """The head of an open artifact. Close it: it holds files open."""

    def __init__(self, artifact: Artifact) -> None:
        """Find the tensors. Raises `ArtifactError` for a graph that is not of this exporter's."""
        manifest = artifact.manifest
        self._where = artifact.path / manifest.graph.file
        self._shape = manifest.model.vocab_size, manifest.model.hidden_size
        self._dtype = np.dtype(manifest.graph.compute_dtype)
        self._files: list[OpenFile] = []
        try:
            for name in (manifest.graph.file, manifest.graph.external_data):
                if name is not None:
                    descriptor = artifact.open_file(name)
                    self._files.append(OpenFile(descriptor, str(artifact.path / name)))
            graph = read_graph(artifact.read_bytes(manifest.graph.file))
            self._weights = graph.tensors
            self._norm = self._values(_NORM, self._shape[1])
            self._blocks = [] if _FLOAT in self._weights else self._checked_blocks(graph)
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Head:
        """The head and the norm, for reading vectors through them."""
        from edge_memllm.interpretation.head import Head

        return Head(self.rows, self._shape[0], self._norm)

    def rows(self, ids: Ids) -> Floats:
        """Return rows [N, D] of the head for token ids [N], as the graph computes with them."""
        runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
        read = self._decoded if self._blocks else self._transposed
        return np.concatenate([read(int(run[0]), len(run)) for run in runs if len(run)])

    def close(self) -> None:
        """Close the files; closing twice is fine."""
        while self._files:
            self._files.pop().close()

    def _transposed(self, start: int, count: int) -> Floats:
        """Rows out of a float matrix [D, V]."""
        vocabulary, width = self._shape
        rows = np.empty((count, width), np.float32)
        size = self._dtype.itemsize
        for column in range(width):
            data = self._read(_FLOAT, (column * vocabulary + start) * size, count * size)
            rows[:, column] = np.frombuffer(data, self._dtype)
        return rows

    def _decoded(self, start: int, count: int) -> Floats:
        """Rows out of codes: the sum of all that there are of each."""
        total = np.zeros((count, self._shape[1]), np.float32)
        for each in self._blocks:
            first, last = max(start, each.start), min(start + count, each.start + each.rows)
            if first < last:
                found = self._block_rows(each, first - each.start, last - first)
                # Fewer columns are those of a matrix over sums of inputs.
                found = np.repeat(found, self._shape[1] // each.columns, axis=1)
                total[first - start : last - start] += found
        return total

    def _block_rows(self, blocks: _Blocks, start: int, count: int) -> Floats:
        """Rows of codes [N, blocks, block * bits / 8], scales [N, blocks] and zero points."""
        across = -(-blocks.columns // blocks.block)
        widths = (across * blocks.block, across, across)
        sizes = (blocks.bits, self._dtype.itemsize * 8, blocks.bits)
        parts = []
        for name, width, bits in zip(blocks.names, widths, sizes, strict=False):
            row = -(-width * bits // 8)
            parts.append(np.frombuffer(self._read(name, start * row, count * row), np.uint8))
        codes = _unpacked(parts[0], blocks.bits).reshape(count, across, -1).astype(np.float32)
        if len(parts) == 3:
            zeros = _unpacked(parts[2], blocks.bits).reshape(count, -1)
            codes -= zeros[:, :across, None]
        else:
            codes -= 2 ** (blocks.bits - 1)
        codes *= parts[1].view(self._dtype).astype(np.float32).reshape(count, across, 1)
        return codes.reshape(count, -1)[:, : blocks.columns]

    def _checked_blocks(self, graph: GraphFile) -> list[_Blocks]:
        """All codes; raises ArtifactError where they do not make up the manifest's rows."""
        found = list(_head_blocks(graph))
        if not found:
            raise ArtifactError(f"{self._where}: has no weight {_FLOAT}{_CODES}. Export again.")
        rows = max(each.start + each.rows for each in found)
        if rows != self._shape[0]:
            raise ArtifactError(
                f"{self._where}: the head has {rows} rows, the manifest says {self._shape[0]}. "
                "Export again."
            )
        widest = max(each.columns for each in found)
        if widest != self._shape[1]:
            raise ArtifactError(
                f"{self._where}: the head has {widest} columns, the manifest says "
                f"{self._shape[1]}. Export again."
            )
        return found

    def _values(self, name: str, count: int) -> Floats:
        data = self._read(name, 0, count * self._dtype.itemsize)
        return np.frombuffer(data, self._dtype).astype(np.float32)

    def _read(self, name: str, offset: int, size: int) -> bytearray:
        weight = self._weight(name)
        outside = weight.outside is not None
        if offset + size > weight.size or outside >= len(self._files):
            raise ArtifactError(
                f"{self._where}: {name} has {weight.size} bytes, too few for the manifest's shape. "
                "Export again."
            )
        data = bytearray(size)
        self._files[outside].fill([memoryview(data)], weight.start + offset)
        return data

    def _weight(self, name: str) -> Tensor:
        if name not in self._weights:
            raise ArtifactError(f"{self._where}: has no weight {name}. Export again.")
        return self._weights[name]


def _head_blocks(graph: GraphFile) -> Iterator[_Blocks]:
    """Yield the head's codes; parts of the same rows follow each other."""
    start, rows, group = 0, 0, None
    for node in graph.nodes:
        if node.op_type != "MatMulNBits" or not node.inputs[1].startswith(_FLOAT):
            continue
        name = node.inputs[1].removesuffix(_CODES)
        found = name.split(".part.")[0].removesuffix(".sums")
        if found != group:
            start, group = start + rows, found
        columns, rows, bits, block = (_number(node, each) for each in _ATTRIBUTES)
        yield _Blocks(tuple(node.inputs[1:]), start, rows, columns, bits, block)


def _number(node: Node, name: str) -> int:
    value = node.attributes.get(name)
    if not is_integer(value) or value < 1:
        raise ArtifactError(f"the head has {name} {value!a:.40}, expected a number. Export again.")
    return value


def _unpacked(stored: Bytes, bits: int) -> Bytes:
    """Codes [n * 8 / bits] of bytes [n], the lowest bits first."""
    if bits == 8:
        return stored
    places = np.arange(0, 8, bits, dtype=np.uint8)
    codes: Bytes = (stored[:, None] >> places & np.uint8(2**bits - 1)).reshape(-1)
    return codes
