"""GGUF files of tiny random Gemma 4 and Gemma 3n networks, as llama.cpp's converter writes them.

Names of tensors are the gguf library's own map of transformers' names; the metadata is the
converter's, key by key.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

VOCABULARY, WIDTH, ROW, WINDOW = 300, 64, 64, 6
SLIDING, FULL = "sliding_attention", "full_attention"
_SHAPE = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": WINDOW,
    "max_position_embeddings": 256,
    "final_logit_softcapping": 30.0,
}
# With rows of tokens, shared keys and values and wide layers; dense, keys being values.
FORMS: dict[str, dict[str, Any]] = {
    "E2B": {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": ROW,
    },
    "E4B": {
        "num_hidden_layers": 5,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": ROW,
    },
    "31B": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
    },
}


def gemma4(form: str, seed: int = 0, **fields: Any) -> Any:
    """A network of transformers in float32 whose every part changes the logits."""
    config = Gemma4TextConfig(**{**_SHAPE, **FORMS[form], **fields})
    return _lively(Gemma4ForCausalLM(config).eval(), seed)


def gemma3n(seed: int = 0, **fields: Any) -> Any:
    """The same of Gemma 3n, its first layers sparse."""
    shape = {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": ROW,
        "laurel_rank": 32,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    }
    own = {name: value for name, value in _SHAPE.items() if name != "global_head_dim"}
    return _lively(Gemma3nForCausalLM(Gemma3nTextConfig(**{**own, **shape, **fields})).eval(), seed)


def _lively(network: Any, seed: int) -> Any:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name:
                # Scores are not divided by the root of a head's width here, so keys are small.
                size = weight.shape[0] ** -0.5 if "k_norm" in name else 1.0
                weight.copy_((0.5 + torch.rand(weight.shape, generator=random)) * size)
            elif "per_layer.weight" in name:
                weight.normal_(0, 0.06, generator=random)
            elif weight.ndim == 1:  # the scale of corrected streams
                weight.copy_(0.5 + torch.rand(weight.shape, generator=random))
            elif "modality_router" in name:  # whose inputs are divided by the width
                weight.normal_(0, weight.shape[1] ** 0.5, generator=random)
            else:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=random)
        for name, buffer in network.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.3 + 0.8 * torch.rand(1, generator=random))
    return network


def gemma4_metadata(config: Any, **changes: Any) -> dict[str, Any]:
    """What the converter writes of a configuration; a change to None leaves a key out."""
    layers, types = config.num_hidden_layers, config.layer_types
    own = [config.per_layer_config[layer] for layer in range(layers)]
    full, local = own[types.index(FULL)].head_dim, own[types.index(SLIDING)].head_dim
    wide = [config.intermediate_size] * layers
    if config.use_double_wide_mlp:
        shared = config.num_kv_shared_layers
        wide[layers - shared :] = [2 * config.intermediate_size] * shared
    kv_heads = np.array([layer.num_key_value_heads for layer in own], np.int32)
    found = {
        "block_count": layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": np.array(wide, np.int32) if len({*wide}) > 1 else wide[0],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads if len({*kv_heads}) > 1 else int(kv_heads[0]),
        "rope.freq_base": config.rope_parameters[FULL]["rope_theta"],
        "rope.freq_base_swa": config.rope_parameters[SLIDING]["rope_theta"],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "final_logit_softcapping": config.final_logit_softcapping,
        "attention.sliding_window": config.sliding_window,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.sliding_window_pattern": np.array([kind == SLIDING for kind in types]),
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": local,
        "attention.value_length_swa": local,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": local,
    }
    whole = {f"gemma4.{name}": value for name, value in found.items()} | changes
    return {key: value for key, value in whole.items() if value is not None}


def gemma4_tensors(network: Any) -> dict[str, np.ndarray]:
    """The tensors of a file, by the file's names, in float32."""
    config = network.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, config.num_hidden_layers)
    found = {}
    for name, value in network.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            found[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = value.numpy()
    width = config.per_layer_config[config.layer_types.index(FULL)].head_dim
    turning = int(width * config.rope_parameters[FULL]["partial_rotary_factor"] / 2)
    factors = [1.0] * turning + [1e30] * (width // 2 - turning)
    return found | {"rope_freqs.weight": np.array(factors, np.float32)}


def gemma3n_metadata(config: Any, **changes: Any) -> dict[str, Any]:
    """What the converter writes of a configuration; a change to None leaves a key out."""
    shares = torch.tensor(config.activation_sparsity_pattern)
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": np.array(config.intermediate_size, np.int32),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": config.rope_parameters[FULL]["rope_theta"],
        "rope.freq_base_swa": config.rope_parameters[SLIDING]["rope_theta"],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "final_logit_softcapping": config.final_logit_softcapping,
        "attention.sliding_window": config.sliding_window,
        "altup.active_idx": config.altup_active_idx,
        "altup.num_inputs": config.altup_num_inputs,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "activation_sparsity_scale": torch.special.ndtri(shares).numpy().astype(np.float32),
        "attention.sliding_window_pattern": np.array([k == SLIDING for k in config.layer_types]),
    }
    whole = {f"gemma3n.{name}": value for name, value in found.items()} | changes
    return {key: value for key, value in whole.items() if value is not None}


def gemma3n_tensors(network: Any) -> dict[str, np.ndarray]:
    """The tensors of a file, by the file's names, in float32; layers keep keys nobody reads."""
    config = network.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3N, config.num_hidden_layers)
    found, stacks = (
        {},
        {"altup_projections": "altup_proj", "altup_unembed_projections": "altup_unembd_proj"},
    )
    for name, value in network.state_dict().items():
        module = name.removeprefix("model.").split(".")[0]
        if module not in stacks and name != "lm_head.weight":
            found[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = value.numpy()
    for module, ours in stacks.items():
        parts = [each.weight for each in getattr(network.model, module)]
        found[f"{ours}.weight"] = torch.stack(parts).detach().numpy()
    keys = config.num_key_value_heads * config.head_dim
    idle = {"attn_k": (keys, config.hidden_size), "attn_v": (keys, config.hidden_size)}
    for layer in range(
        config.num_hidden_layers - config.num_kv_shared_layers, config.num_hidden_layers
    ):
        for each, shape in {**idle, "attn_k_norm": (config.head_dim,)}.items():
            found[f"blk.{layer}.{each}.weight"] = np.ones(shape, np.float32)
    return found
