"""The last norm and the head of an artifact, read out of its graph file: no library, no session.

The exporter names them `model.norm.weight` and `lm_head.weight`; a quantised head has codes and
scales for MatMulNBits, a float one is stored transposed. Rows are read when they are asked for, so
that memory stays small however large the vocabulary is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge_memllm.arrays import Floats, Ids
from edge_memllm.errors import ArtifactError
from edge_memllm.readers.reader import OpenFile
from edge_memllm_runtimes.graph_file import Tensor, read_graph

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact
    from edge_memllm.interpretation.head import Head


_NORM, _FLOAT = "model.norm.weight", "lm_head.weight"
_CODES, _SCALES = "lm_head.weight_codes", "lm_head.weight_scales"


class GraphHead:
    """The head of an open artifact. Close it: it holds files open."""

    def __init__(self, artifact: Artifact) -> None:
        """Find the tensors. Raises `ArtifactError` for a graph that is not of this exporter's."""
        manifest = artifact.manifest
        self._where = artifact.path / manifest.graph.file
        self._shape = manifest.model.vocab_size, manifest.model.hidden_size
        self._dtype = np.dtype(manifest.graph.compute_dtype)
        self._prefers = 8 if manifest.graph.weights == "int8" else 4
        self._files: list[OpenFile] = []
        try:
            for name in (manifest.graph.file, manifest.graph.external_data):
                if name is not None:
                    descriptor = artifact.open_file(name)
                    self._files.append(OpenFile(descriptor, str(artifact.path / name)))
            self._weights = read_graph(artifact.read_bytes(manifest.graph.file)).tensors
            self._norm = self._values(_NORM, self._shape[1])
            self._form = None if _FLOAT in self._weights else self._blocks()
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
        read = self._transposed if self._form is None else self._decoded
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
        """Rows out of codes [V, blocks, block * bits / 8] and scales [V, blocks]."""
        assert self._form is not None
        bits, blocks, block_bytes = self._form
        row, scale_row = blocks * block_bytes, blocks * self._dtype.itemsize
        codes = np.frombuffer(self._read(_CODES, start * row, count * row), np.uint8)
        scales = self._read(_SCALES, start * scale_row, count * scale_row)
        if bits == 4:  # low nibble first
            codes = np.stack([codes & 15, codes >> 4], axis=-1)
        values = codes.reshape(count, blocks, -1).astype(np.float32) - 2 ** (bits - 1)
        values *= np.frombuffer(scales, self._dtype).astype(np.float32).reshape(count, blocks, 1)
        rows: Floats = values.reshape(count, -1)[:, : self._shape[1]]
        return rows

    def _blocks(self) -> tuple[int, int, int]:
        """Bits, blocks of a row and bytes of a block, from the sizes of the tensors."""
        vocabulary, width = self._shape
        codes, scales = self._weight(_CODES).size, self._weight(_SCALES).size
        blocks = scales // (vocabulary * self._dtype.itemsize)
        block_bytes = codes // (vocabulary * max(1, blocks))
        for bits in (self._prefers, 12 - self._prefers):
            block = block_bytes * 8 // bits
            if block and -(-width // block) == blocks:
                return bits, blocks, block_bytes
        raise ArtifactError(
            f"{self._where}: the head has {codes} bytes of codes and {scales} of scales, which "
            f"are no {vocabulary} rows of {width} in 4 or 8 bits. Export again."
        )

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
