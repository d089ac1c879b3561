"""A trained checkpoint on disk: configuration, memory-mapped safetensors weights, identity.

Weights are never copied as a whole: arrays and the network built on them read the files' pages,
so that anonymous memory stays small however large the model is. Pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.engine.request import check_tokens
from edge_memllm.errors import ExportError, RequestError
from edge_memllm.modeling.stored_weights import (
    CONFIG_FILE,
    UnusableCheckpointError,
    read_fields,
    read_json,
    read_weights,
)
from edge_memllm.text import GENERATION_FILE
from edge_memllm_export.architectures import open_architecture
from edge_memllm_export.architectures.architecture import Architecture, Weights
from edge_memllm_export.architectures.mapped_weights import weight_array


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder as a `Source`."""

    path: Path
    fields: Mapping[str, Any]

    @property
    def where(self) -> Path:
        """The file of the configuration."""
        return self.path / CONFIG_FILE

    def weights(self, expected: Weights, *, tied: bool, described: str) -> Weights:
        """The folder's weights, mapped, in their dtype; see `Source`."""
        return read_weights(self.path, expected, tied=tied, described=described)


class Checkpoint:
    """An opened checkpoint folder, its model being one of a family that is known."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        self.path = path
        self.architecture = architecture

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open the folder; ExportError names what is missing, foreign, misshapen or pickled."""
        try:
            return cls(path, open_architecture(Folder(path, read_fields(path))))
        except UnusableCheckpointError as error:
            raise ExportError(str(error)) from error

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

    def identity(self) -> str:
        """``sha256:...`` over the configuration and every weight (name, dtype, shape, values).

        How the weights are spread over files does not matter.
        """
        facts = json.dumps(dict(self.architecture.facts), sort_keys=True)
        digest = hashlib.sha256(facts.encode())
        for name in self.weight_names:
            weight = self.architecture.weights[name]
            digest.update(f"\n{name} {weight.dtype} {list(weight.shape)}\n".encode())
            digest.update(weight.view(torch.uint8).numpy())
        return f"sha256:{digest.hexdigest()}"

    def _eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text: those of generation_config.json, else those of config.json."""
        where = self.path / GENERATION_FILE
        found = _read_json(where).get("eos_token_id") if where.is_file() else None
        if found is None:
            where, found = self.path / CONFIG_FILE, self.architecture.fields.get("eos_token_id")
        ids = [] if found is None else found if isinstance(found, list) else [found]
        try:
            return tuple(check_tokens(ids, self.architecture.spec.vocab_size))
        except RequestError as error:
            raise ExportError(f"{where}: eos_token_id: {error} Correct it.") from error


def _read_json(where: Path) -> dict[str, Any]:
    try:
        return read_json(where)
    except UnusableCheckpointError as error:
        raise ExportError(str(error)) from error
