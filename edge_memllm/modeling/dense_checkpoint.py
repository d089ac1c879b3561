"""A dense checkpoint of another family read as the family's own dense network, beta 8.

Llama, Mistral, Qwen2 and Qwen3 differ from it in names of their configuration only: the weights
are called the same. What this network does not have is refused by name, never dropped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_memllm.errors import RecipeError
from edge_memllm.modeling.configuration import DENSE_BETA, ROPE_TYPES, MemoryLLMConfig
from edge_memllm.modeling.network import MemoryLLMForCausalLM
from edge_memllm.modeling.stored_weights import (
    CONFIG_FILE,
    UnusableCheckpointError,
    describing,
    expected_weights,
    network_over,
    read_fields,
    read_weights,
)

# model_type -> what its attention has that plain attention has not.
_ATTENTION: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    MemoryLLMConfig.model_type: {},
}
_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)


def dense_config(path: Path) -> MemoryLLMConfig:
    """The configuration of the checkpoint in the folder ``path``, as that of a dense network.

    RecipeError names what is missing, and what this network cannot do as the checkpoint does it.
    """
    where = path / CONFIG_FILE
    try:
        fields = read_fields(path)
        kind = fields.get("model_type")
        if not isinstance(kind, str) or kind not in _ATTENTION:
            raise RecipeError(
                f"{where}: model_type is {kind!r}; networks of {', '.join(_ATTENTION)} are "
                "converted."
            )
        with describing(where, "cannot be converted"):
            config = _translated(kind, fields)
            expected_weights(config)
    except UnusableCheckpointError as error:
        raise RecipeError(str(error)) from error
    return config


def dense_network(path: Path) -> MemoryLLMForCausalLM:
    """The checkpoint's network: its weights in ``dense_config``'s shape, frozen, in float32.

    RecipeError names the first that is missing, foreign or cannot be used.
    """
    config = dense_config(path)
    try:
        weights = read_weights(path, config)
    except UnusableCheckpointError as error:
        raise RecipeError(str(error)) from error
    return network_over(config, {name: weight.float() for name, weight in weights.items()})


def _translated(kind: str, fields: dict[str, Any]) -> MemoryLLMConfig:
    """Our configuration from that of another family; ValueError says what has no counterpart."""
    if kind == MemoryLLMConfig.model_type:
        return _own_dense(MemoryLLMConfig.from_dict(fields))
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(kind, **{k: v for k, v in fields.items() if k != "model_type"})
    _refuse(kind, theirs)
    return MemoryLLMConfig(
        **{name: getattr(theirs, name) for name in _COPIED},
        **_ATTENTION[kind],
        head_dim=getattr(theirs, "head_dim", None),
        rope_parameters=dict(theirs.rope_parameters),
        pad_token_id=theirs.pad_token_id,
        beta=DENSE_BETA,
    )


def _own_dense(config: MemoryLLMConfig) -> MemoryLLMConfig:
    """One of the family, if it is the dense one."""
    found = {name: getattr(config, name) for name in ("beta", "compute_form", "compute_placement")}
    wanted = {"beta": DENSE_BETA, "compute_form": "swiglu", "compute_placement": "sequential"}
    if found != wanted:
        raise ValueError(f"it has {_listed(found)}; only {_listed(wanted)} is converted.")
    return config


def _refuse(kind: str, theirs: Any) -> None:
    """Name what the network computes and ours cannot."""
    positions = theirs.max_position_embeddings
    window = getattr(theirs, "sliding_window", None)
    if window is not None and window < positions:
        raise ValueError(
            f"its attention has a sliding window of {window} tokens within "
            f"{positions} positions, which the graph has not. Where the model may be used "
            f"without, set max_position_embeddings in its config.json to {window}."
        )
    if theirs.hidden_act != "silu":
        raise ValueError(f"hidden_act is {theirs.hidden_act!r}; only 'silu' is converted.")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(theirs, name, False):
            raise ValueError(f"{name} is true for {kind}: biases of matrices that have none here.")
    rope = theirs.rope_parameters
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise ValueError(
            f"rope_type is {rope['rope_type']!r}; {', '.join(ROPE_TYPES)} are converted."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("its rotary embedding turns a part of each head only.")
    if getattr(theirs, "pretraining_tp", 1) != 1:
        raise ValueError(f"pretraining_tp is {theirs.pretraining_tp}, expected 1.")


def _listed(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in fields.items())
