"""A GGUF file as a `Source`: its weights in the floats that hold what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from edge_memllm.modeling.stored_weights import NameOf, UnusableCheckpointError
from edge_memllm_export.architectures.architecture import Weights
from edge_memllm_export.sources.gguf_file import GGUFFile
from edge_memllm_export.sources.gguf_grids import Grid

# What is stored in 16 bits stays in them; all else becomes float32, exactly.
_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


class GGUFModel:
    """The model of one file."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises ExportError as `GGUFFile.open`."""
        self._file = GGUFFile.open(path)
        self.path = path
        self.fields: Mapping[str, Any] = self._file.config

    @property
    def where(self) -> Path:
        """The file itself."""
        return self.path

    def weights(
        self,
        expected: Weights,
        *,
        tied: bool,
        described: str,
        named: NameOf = str,
        apart: str | None = None,
    ) -> Weights:
        """The file's weights, dequantised; its names are the networks' own. See `Source`.

        That which is `apart` has no values: a table of rows is larger than all others together.
        """
        names = set(self._file.names)
        if odd := sorted(names ^ expected.keys()):
            what = "holds" if odd[0] in names else "lacks"
            raise UnusableCheckpointError(
                f"{self.path}: {what} the weight {odd[0]}, which does not fit its metadata "
                f"({described}). Get the file again, or give the model as a folder."
            )
        return {
            name: self._empty(name) if name == apart else self._weight(name)
            for name in sorted(names)
        }

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a matrix, dequantised; see `Source`."""
        return torch.from_numpy(self._file.read(name, start, stop)).to(self._dtype(name))

    @property
    def kinds(self) -> Mapping[str, str]:
        """GGUF's name of the type of each matrix, by the matrix's name."""
        file = self._file
        return {name: file.kind(name) for name in file.names if len(file.shape(name)) > 1}

    def grid(self, name: str, start: int = 0, stop: int | None = None) -> Grid | None:
        """How the file stores a matrix; see `Source`."""
        return self._file.grid(name, start, stop)

    def text_file(self, name: str) -> bytes | None:
        """The content of a file that a folder would have; see `Source`."""
        return self._text_files.get(name)

    @cached_property
    def _text_files(self) -> dict[str, bytes]:
        return self._file.text_files()

    def _dtype(self, name: str) -> torch.dtype:
        return _HALVES.get(self._file.kind(name), torch.float32)

    def _empty(self, name: str) -> torch.Tensor:
        return torch.empty(self._file.shape(name), dtype=self._dtype(name), device="meta")

    def _weight(self, name: str) -> torch.Tensor:
        weight = torch.from_numpy(self._file.read(name))
        half = weight.to(self._dtype(name))
        return half if torch.equal(half.float(), weight) else weight
