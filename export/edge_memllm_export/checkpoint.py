"""A trained checkpoint on disk, a folder or a GGUF file: configuration, weights, identity.

Weights of a folder are never copied as a whole: arrays and the network built on them read the
files' pages, so that anonymous memory stays small however large the model is. Those of a GGUF file
are dequantised. Pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.engine.request import check_tokens
from edge_memllm.errors import ExportError, RequestError
from edge_memllm.modeling.stored_weights import (
    UnusableCheckpointError,
    json_object,
    read_fields,
)
from edge_memllm.text import GENERATION_FILE
from edge_memllm_export.architectures import open_architecture
from edge_memllm_export.architectures.architecture import Architecture, Source
from edge_memllm_export.architectures.mapped_weights import weight_array
from edge_memllm_export.sources.folder import Folder
from edge_memllm_export.sources.gguf_grids import Grid, has_grid
from edge_memllm_export.sources.gguf_model import GGUFModel

_PART_VALUES = 1 << 22  # of a weight that is read in parts
_EMBEDDING = "model.embed_tokens.weight"  # of every family


class Checkpoint:
    """An opened checkpoint, its model being one of a family that is known."""

    def __init__(self, source: Source, architecture: Architecture) -> None:
        self.path = source.path
        self.architecture = architecture
        self._source = source

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a folder or a GGUF file.

        Raises:
            ExportError: It names what is missing, foreign, misshapen or pickled.
        """
        try:
            source = _open_source(path)
            return cls(source, open_architecture(source))
        except UnusableCheckpointError as error:
            raise ExportError(str(error)) from error

    def limited(self, context: int) -> Checkpoint:
        """The same checkpoint for texts of at most so many positions."""
        return Checkpoint(self._source, self.architecture.limited(context))

    def text_file(self, name: str) -> bytes | None:
        """The content of one of `edge_memllm.text.TEXT_FILES`; None where there is none.

        Raises:
            ExportError: It cannot be read.
        """
        try:
            return self._source.text_file(name)
        except UnusableCheckpointError as error:
            raise ExportError(str(error)) from error
        except OSError as error:
            raise ExportError(
                f"{self.path / name}: cannot be read ({error.strerror}). Check the disk."
            ) from error

    @cached_property
    def spec(self) -> ModelSpec:
        """What a manifest says of the model, but for its identity, which takes all weights."""
        return replace(self.architecture.spec, eos_token_ids=self._eos_token_ids())

    @property
    def weight_names(self) -> list[str]:
        """The names of all weights, sorted."""
        return sorted(self.architecture.weights)

    @property
    def parameters(self) -> int:
        """Numbers in all weights; a tied head counts once."""
        return sum(weight.numel() for weight in self.architecture.weights.values())

    def array(self, name: str) -> np.ndarray:
        """A weight by its name, a view of the file in the dtype it is stored in."""
        return weight_array(self.architecture.weights[name])

    @cached_property
    def kinds(self) -> Mapping[str, str]:
        """The type that each matrix of a quantised file is stored in, by name; else nothing."""
        return self._source.kinds

    @property
    def has_grids(self) -> bool:
        """Whether matrices are stored on grids, which a graph can keep."""
        return any(has_grid(GGMLQuantizationType[kind]) for kind in self.kinds.values())

    def grid(self, name: str) -> Grid | None:
        """How a weight is stored, where that is a grid.

        Raises:
            ExportError: A number of it is not finite.
        """
        return self._source.grid(name)

    def embedding_grid(self, start: int, stop: int) -> Grid | None:
        """Rows of the embedding as they are stored, from `start` to before `stop`; None if no grid.

        Raises:
            ExportError: They are damaged.
        """
        return self._source.grid(_EMBEDDING, start, stop)

    def row_grid(self, start: int, stop: int) -> Grid | None:
        """Memory rows of tokens as they are stored, from `start` to before `stop`; None if no grid.

        Raises:
            ExportError: They are damaged.
        """
        table = self.architecture.row_table
        return None if table is None else self._source.grid(table, start, stop)

    def identity(self) -> str:
        """``sha256:...`` over the configuration and every weight (name, dtype, shape, values).

        How the weights are spread over files does not matter.
        """
        facts = json.dumps(dict(self.architecture.facts), sort_keys=True)
        digest = hashlib.sha256(facts.encode())
        for name in self.weight_names:
            weight = self.architecture.weights[name]
            digest.update(f"\n{name} {weight.dtype} {list(weight.shape)}\n".encode())
            for part in self._parts(name, weight):
                digest.update(part.view(torch.uint8).numpy())
        return f"sha256:{digest.hexdigest()}"

    def _parts(self, name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """All values of a weight; one that has none here is read in parts."""
        if not weight.is_meta:
            yield weight
            return
        step = max(1, _PART_VALUES // weight.shape[1])
        for start in range(0, len(weight), step):
            yield self._source.rows(name, start, start + step)

    def _eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text: those of generation_config.json, else those of config.json."""
        where, found = self.path / GENERATION_FILE, None
        if (content := self.text_file(GENERATION_FILE)) is not None:
            try:
                found = json_object(content, where).get("eos_token_id")
            except UnusableCheckpointError as error:
                raise ExportError(str(error)) from error
        if found is None:
            where, found = self._source.where, self.architecture.fields.get("eos_token_id")
        ids = [] if found is None else found if isinstance(found, list) else [found]
        try:
            return tuple(check_tokens(ids, self.architecture.spec.vocab_size))
        except RequestError as error:
            raise ExportError(f"{where}: eos_token_id: {error} Correct it.") from error


def _open_source(path: Path) -> Source:
    """Whatever is there: a folder, or a file that calls itself GGUF."""
    if path.is_file():
        return GGUFModel(path)
    return Folder(path, read_fields(path))
