"""A trained checkpoint on disk: configuration, memory-mapped safetensors weights, identity.

Weights are never copied as a whole: arrays and the network built on them read the files' pages,
so that anonymous memory stays small however large the model is. Pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from edge_memllm.errors import ExportError, RequestError
from edge_memllm.modeling import MemoryLLMConfig, MemoryLLMForCausalLM
from edge_memllm.modeling.stored_weights import (
    CONFIG_FILE,
    UnusableCheckpointError,
    describing,
    expected_weights,
    network_over,
    read_fields,
    read_json,
    read_weights,
)
from edge_memllm.request import check_tokens
from edge_memllm.text import GENERATION_FILE

_LEARNED_GAIN = "model.token_memory.gain"
# The fields that change what the network computes; the rest may differ between equal models.
_IDENTITY_FIELDS = (
    "beta",
    "compute_form",
    "compute_placement",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "memory_intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)


class Checkpoint:
    """An opened checkpoint folder. Its weights are those of the files, mapped, in their dtype."""

    def __init__(
        self, path: Path, config: MemoryLLMConfig, weights: Mapping[str, torch.Tensor]
    ) -> None:
        self.path = path
        self.config = config
        self._weights = weights

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open the folder; ExportError names what is missing, foreign, misshapen or pickled."""
        try:
            config = _read_config(path)
            return cls(path, config, read_weights(path, config))
        except UnusableCheckpointError as error:
            raise ExportError(str(error)) from error

    @property
    def memory_gain(self) -> tuple[float, ...]:
        """One factor per layer: the configuration's, all ones if none, times the learned one."""
        layers = self.config.num_hidden_layers
        gain = self.config.memory_gain or (1.0,) * layers
        learned = self._weights.get(_LEARNED_GAIN, torch.ones(layers))
        return tuple(map(operator.mul, gain, learned.tolist()))

    @property
    def weight_names(self) -> list[str]:
        """The names of all weights, sorted."""
        return sorted(self._weights)

    @property
    def parameters(self) -> int:
        """Numbers in all weights; a tied head counts once."""
        return sum(weight.numel() for weight in self._weights.values())

    def array(self, name: str) -> np.ndarray:
        """A weight by its name, a view of the file in the dtype it is stored in."""
        weight = self._weights[name]
        if weight.dtype == torch.bfloat16:
            return weight.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return weight.numpy()

    def identity(self) -> str:
        """``sha256:...`` over the configuration and every weight (name, dtype, shape, values).

        How the weights are spread over files does not matter.
        """
        fields = {name: getattr(self.config, name) for name in _IDENTITY_FIELDS}
        fields["memory_gain"] = self.memory_gain
        fields |= _unusual_attention(self.config)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for name in sorted(self._weights):
            weight = self._weights[name]
            digest.update(f"\n{name} {weight.dtype} {list(weight.shape)}\n".encode())
            digest.update(weight.view(torch.uint8).numpy())
        return f"sha256:{digest.hexdigest()}"

    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text: those of generation_config.json, else those of config.json."""
        where = self.path / GENERATION_FILE
        found = _read_json(where).get("eos_token_id") if where.is_file() else None
        if found is None:
            where, found = self.path / CONFIG_FILE, self.config.eos_token_id
        ids = [] if found is None else found if isinstance(found, list) else [found]
        try:
            return tuple(check_tokens(ids, self.config.vocab_size))
        except RequestError as error:
            raise ExportError(f"{where}: eos_token_id: {error} Correct it.") from error

    def network(
        self, device: str = "cpu", compute_dtype: torch.dtype = torch.float32
    ) -> MemoryLLMForCausalLM:
        """The network over the mapped weights, for evaluation in ``compute_dtype``.

        A matrix stored in another dtype is converted while it is used, one at a time.
        """
        network = network_over(self.config, self._weights).to(device)
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = _ConvertingLinear
                module.compute_dtype = compute_dtype
            elif isinstance(module, nn.Embedding):
                module.__class__ = _FloatEmbedding
        return network


def _unusual_attention(config: MemoryLLMConfig) -> dict[str, Any]:
    """What identity adds where attention is not plain; biases show in the weights' names."""
    rope: Any = config.rope_parameters
    fields: dict[str, Any] = {"qk_norm": True} if config.qk_norm else {}
    plain = rope.get("rope_type", "default") == "default"
    return fields if plain else {**fields, "rope_parameters": rope}


class _ConvertingLinear(nn.Linear):
    """A linear layer that computes in ``compute_dtype``, whatever its weight is stored in."""

    compute_dtype: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class _FloatEmbedding(nn.Embedding):
    """An embedding whose rows come out as float32."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).float()


def _read_config(path: Path) -> MemoryLLMConfig:
    fields, where = read_fields(path), path / CONFIG_FILE
    found = fields.get("model_type")
    if found != MemoryLLMConfig.model_type:
        raise ExportError(
            f"{where}: model_type is {found!r}, expected {MemoryLLMConfig.model_type!r}. "
            "Only checkpoints of the MemoryLLM family can be exported."
        )
    with describing(where, "describes no network"):
        config = MemoryLLMConfig.from_dict(fields)
        expected_weights(config)
    return config


def _read_json(where: Path) -> dict[str, Any]:
    try:
        return read_json(where)
    except UnusableCheckpointError as error:
        raise ExportError(str(error)) from error
