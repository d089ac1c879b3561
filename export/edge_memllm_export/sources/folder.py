"""A checkpoint folder of transformers: configuration, mapped safetensors weights, text files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_memllm.modeling.stored_weights import (
    CONFIG_FILE,
    NameOf,
    read_weights,
    refuse_pointer,
)
from edge_memllm_export.architectures.architecture import Weights


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder as a `Source`."""

    path: Path
    fields: Mapping[str, Any]

    @property
    def where(self) -> Path:
        """The file of the configuration."""
        return self.path / CONFIG_FILE

    def weights(
        self,
        expected: Weights,
        *,
        tied: bool,
        described: str,
        named: NameOf = str,
        apart: str | None = None,
    ) -> Weights:
        """The folder's weights, mapped, in their dtype; see `Source`."""
        return read_weights(self.path, expected, tied=tied, described=described, named=named)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Never asked for: all weights come with values; see `Source`."""
        raise NotImplementedError(f"{self.path}: {name} has values.")

    @property
    def kinds(self) -> Mapping[str, str]:
        """Nothing: weights are floats."""
        return {}

    def grid(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing: what a folder stores is no grid; see `Source`."""

    def text_file(self, name: str) -> bytes | None:
        """The content of a file of the folder; see `Source`."""
        path = self.path / name
        if not path.is_file():
            return None
        refuse_pointer(path)
        return path.read_bytes()
