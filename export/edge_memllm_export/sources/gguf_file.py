"""A model in one GGUF file: its configuration, weights by transformers' names, stored grids, text.

The file is mapped and read matrix by matrix, rows in chunks, so that memory holds what was asked
for and nothing else. Nothing here knows of graphs, tables or quantisation of our own.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.errors import ExportError
from edge_memllm_export.sources.gguf_config import GGUFConfig
from edge_memllm_export.sources.gguf_grids import Grid, has_grid, read_grid
from edge_memllm_export.sources.gguf_header import StoredTensor, read_header
from edge_memllm_export.sources.gguf_metadata import ROTARY_FACTORS
from edge_memllm_export.sources.gguf_tokenizer import GGUFTokenizer

_CHUNK = 1 << 22  # weights that are dequantised at once: 16 MB as floats
_ROTATED = (".q_proj.", ".k_proj.")


class GGUFFile:
    """An opened file. Its arrays are copies; it may be read by several threads."""

    def __init__(self, path: Path, data: memoryview) -> None:
        """Take the bytes of the file at `path`; `open` says what is refused."""
        self.path = path
        self._data = data
        self._header = read_header(data, str(path))
        tensors = self._header.tensors
        self._check_types()
        factors = tensors.get(ROTARY_FACTORS)
        self._config = GGUFConfig(
            self._header.metadata,
            {name: tensor.shape for name, tensor in tensors.items()},
            None if factors is None else self._dequantised(factors, None)[0],
            str(path),
        )

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Map the file and read its head.

        Raises:
            ExportError: It cannot be read, is damaged, or holds a model that cannot be had exactly.
        """
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ExportError(
                f"{path}: cannot be read ({error.strerror}). Check the path."
            ) from error
        except ValueError as error:  # as mmap calls an empty file
            raise ExportError(f"{path}: is empty, expected a GGUF file. Get it again.") from error
        return cls(path, memoryview(data))

    @cached_property
    def tokenizer(self) -> GGUFTokenizer | None:
        """What the file says of text; None where it says nothing.

        Raises:
            ExportError: It says what cannot be followed, or has more tokens than the model.
        """
        if self._header.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
            return None
        tokenizer = GGUFTokenizer(self._header.metadata, str(self.path))
        if tokenizer.size > self._config.fields["vocab_size"]:
            raise ExportError(
                f"{self.path}: the tokenizer has {tokenizer.size} tokens, the embedding "
                f"{self._config.fields['vocab_size']} rows. The file is another model's in part: "
                "get it again."
            )
        return tokenizer

    @property
    def config(self) -> dict[str, Any]:
        """What the config.json of this model holds: all that transformers needs to build it."""
        ids = {} if self.tokenizer is None else self.tokenizer.special_ids()
        return {**self._config.fields, **ids}

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter, by transformers' name; a tied head is not among them."""
        return tuple(self._config.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter: [rows, columns], or [columns] of a norm or bias."""
        parameter = self._config.tensors[name]
        return parameter.shape if parameter.part is None else parameter.shape[1:]

    def kind(self, name: str) -> str:
        """GGUF's name of the type a parameter is stored in, such as Q4_K or F16."""
        return self._stored(name).kind.name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """A parameter in float32, of a matrix the rows from `start` to before `stop`.

        Raises:
            ExportError: Some of it is no finite number.
        """
        stored, rows = self._stored(name), self._rows(name)
        if len(stored.shape) == 1:
            weights = self._dequantised(stored, None)[0][rows]
        else:
            rows = rows[start:stop]
            weights = np.empty((len(rows), stored.shape[-1]), np.float32)
            for chunk in _chunks(*weights.shape):
                weights[chunk] = self._dequantised(stored, rows[chunk])
        if self._config.network.shifted_norms and name.endswith("norm.weight"):
            weights -= np.float32(1)
        return weights

    def grid(self, name: str, start: int = 0, stop: int | None = None) -> Grid | None:
        """How a matrix is stored, rows as in `read`; None where its type is no grid.

        The grid's `weights` are what `read` gives, bit for bit.

        Raises:
            ExportError: A scale or a minimum is no finite number.
        """
        stored, rows = self._stored(name), self._rows(name)
        if not has_grid(stored.kind) or len(stored.shape) == 1:
            return None
        first, rows = self._grid(stored, rows[:1]), rows[start:stop]
        codes = np.empty((len(rows), first.codes.shape[1]), first.codes.dtype)
        scales = np.empty((len(rows), first.scales.shape[1]), np.float32)
        minima = None if first.minima is None else np.empty_like(scales)
        for chunk in _chunks(len(rows), stored.shape[-1]):
            part = self._grid(stored, rows[chunk])
            codes[chunk], scales[chunk] = part.codes, part.scales
            if minima is not None:
                minima[chunk] = part.minima
        return Grid(first.kind, codes, scales, minima, first.block)

    def text_files(self) -> dict[str, bytes]:
        """The tokenizer's files as a folder of transformers has them, by name; none if it has none.

        Raises:
            ExportError: The tokenizer is damaged.
        """
        return {} if self.tokenizer is None else self.tokenizer.files()

    def _stored(self, name: str) -> StoredTensor:
        return self._header.tensors[self._config.tensors[name].tensor]

    def _check_types(self) -> None:
        """Refuse at once what `read` could not read minutes later."""
        for tensor in self._header.tensors.values():
            try:
                dequantize(np.zeros((1, _row_bytes(tensor)), np.uint8), tensor.kind)
            except NotImplementedError as error:
                raise ExportError(
                    f"{self.path}: tensor {tensor.name} is of type {tensor.kind.name}, which the "
                    "gguf library does not dequantise. Quantise the model to another type, Q8_0 "
                    "for one."
                ) from error

    def _rows(self, name: str) -> NDArray[np.int64]:
        """Where each row of a matrix, or number of a vector, lies in the file."""
        rows = np.arange(self.shape(name)[0])
        rows += len(rows) * (self._config.tensors[name].part or 0)
        if self._config.network.permuted and any(part in name for part in _ROTATED):
            half = self._config.fields["head_dim"] // 2
            return rows.reshape(-1, half, 2).swapaxes(1, 2).reshape(-1)
        return rows

    def _bytes(self, stored: StoredTensor, rows: NDArray[np.int64] | None) -> Bytes:
        """The stored bytes of rows [rows, bytes of a row]; None for all."""
        part = self._data[stored.offset : stored.offset + stored.size]
        matrix = np.frombuffer(part, np.uint8).reshape(-1, _row_bytes(stored))
        return matrix if rows is None else matrix[rows]

    def _grid(self, stored: StoredTensor, rows: NDArray[np.int64]) -> Grid:
        grid = read_grid(self._bytes(stored, rows), stored.kind)
        if not grid.finite:
            self._refuse_numbers(stored)
        return grid

    def _dequantised(self, stored: StoredTensor, rows: NDArray[np.int64] | None) -> Floats:
        """Weights [rows, columns] as the file orders them."""
        if has_grid(stored.kind) and rows is not None:
            return self._grid(stored, rows).weights()
        with np.errstate(all="ignore"):
            weights: Floats = dequantize(self._bytes(stored, rows), stored.kind)
        if not np.isfinite(weights).all():
            self._refuse_numbers(stored)
        return weights

    def _refuse_numbers(self, stored: StoredTensor) -> NoReturn:
        raise ExportError(
            f"{self.path}: tensor {stored.name} holds what is no finite number. The file is "
            "damaged: get it again."
        )


def _row_bytes(stored: StoredTensor) -> int:
    block, block_bytes = GGML_QUANT_SIZES[stored.kind]
    return stored.shape[-1] // block * block_bytes


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that hold `_CHUNK` weights at most, one row at least."""
    step = max(1, _CHUNK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
