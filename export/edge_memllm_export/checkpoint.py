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
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from edge_memllm.errors import ExportError
from edge_memllm.modeling import MemoryLLMConfig, MemoryLLMForCausalLM

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LEARNED_GAIN = "model.token_memory.gain"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
        if not path.is_dir():
            raise ExportError(f"{path}: no such folder. Give the folder of a trained checkpoint.")
        config = _read_config(path)
        weights = _map_weights(path)
        _check_weights(path, config, weights)
        return cls(path, config, weights)

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
        generation = self.path / "generation_config.json"
        found = _read_json(generation).get("eos_token_id") if generation.is_file() else None
        ids = self.config.eos_token_id if found is None else found
        ids = [] if ids is None else ids
        return tuple(ids if isinstance(ids, list) else [ids])

    def network(
        self, device: str = "cpu", compute_dtype: torch.dtype = torch.float32
    ) -> MemoryLLMForCausalLM:
        """The network over the mapped weights, for evaluation in ``compute_dtype``.

        A matrix stored in another dtype is converted while it is used, one at a time.
        """
        with torch.device("meta"):
            network = MemoryLLMForCausalLM(self.config)
        network.load_state_dict(dict(self._weights), strict=False, assign=True)
        network.tie_weights()
        # Not a weight, so not in the files: made again, outside of the meta device.
        network.model.rotary_emb = type(network.model.rotary_emb)(self.config)
        network.requires_grad_(False).eval().to(device)
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
    where = path / "config.json"
    if not where.is_file():
        raise ExportError(f"{where}: no such file. A checkpoint folder holds config.json.")
    fields = _read_json(where)
    found = fields.get("model_type")
    if found != MemoryLLMConfig.model_type:
        raise ExportError(
            f"{where}: model_type is {found!r}, expected {MemoryLLMConfig.model_type!r}. "
            "Only checkpoints of the MemoryLLM family can be exported."
        )
    try:
        config = MemoryLLMConfig.from_dict(fields)
        _expected_weights(config)
    except (StrictDataclassError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ExportError(f"{where}: describes no network: {reason}") from error
    return config


def _expected_weights(config: MemoryLLMConfig) -> dict[str, torch.Tensor]:
    """Names and shapes of the weights a network of this configuration has; no memory."""
    with torch.device("meta"):
        return dict(MemoryLLMForCausalLM(config).named_parameters())


def _read_json(where: Path) -> dict[str, Any]:
    try:
        content = json.loads(where.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{where}: this is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ExportError(f"{where}: expected a JSON object at the top.")
    return content


def _map_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint's file, or of the files its index names, mapped."""
    if (path / _INDEX).is_file():
        names = _read_json(path / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise ExportError(f"{path / _INDEX}: expected 'weight_map' to name a file per weight.")
        files = sorted(set(names.values()))
        if any(Path(name).name != name for name in files):
            raise ExportError(f"{path / _INDEX}: a file name has a folder in it, expected none.")
    elif (path / _SINGLE).is_file():
        files = [_SINGLE]
    else:
        raise _no_weights(path)
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights |= _map_file(path / file)
    return weights


def _no_weights(path: Path) -> ExportError:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return ExportError(
            f"{path}: found {pickles[0]} but no {_SINGLE}. Pickled weights are not read, because "
            "loading them runs code from the file. Save the checkpoint as safetensors."
        )
    return ExportError(f"{path}: found no weights, expected {_SINGLE} or {_INDEX}.")


def _map_file(where: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(where, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{where}: cannot be read as safetensors ({error}).") from error


def _check_weights(
    path: Path, config: MemoryLLMConfig, weights: Mapping[str, torch.Tensor]
) -> None:
    expected = _expected_weights(config)
    missing, foreign = sorted(expected.keys() - weights), sorted(weights.keys() - expected)
    if missing or foreign:
        what = f"lacks the weight {missing[0]}" if missing else f"holds a weight {foreign[0]}"
        raise ExportError(
            f"{path}: the checkpoint {what}, which does not fit its config.json "
            f"(beta {config.beta}, {config.num_hidden_layers} layers)."
        )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ExportError(
                f"{path}: {name} is {list(weight.shape)}, config.json makes it "
                f"{list(expected[name].shape)}."
            )
        if weight.dtype not in _DTYPES:
            raise ExportError(
                f"{path}: {name} is {weight.dtype}, expected float32, float16 or bfloat16."
            )
