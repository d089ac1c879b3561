"""Tiny checkpoints: random ones of the whole family and of the dense families, and their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, HEADS, VOCABULARY, CONTEXT = 64, 2, 4, 300, 512
BOS, EOS, PAD = 256, 257, 258

MakeCheckpoint = Callable[..., Path]
MakeArtifact = Callable[..., Path]


def write_checkpoint(path: Path, *, dtype: str, seed: int, **fields: Any) -> None:
    """Write a tiny random checkpoint with a byte-level tokenizer into the folder ``path``."""
    import torch

    from edge_memllm.modeling import MemoryLLMConfig, MemoryLLMForCausalLM

    torch.set_num_threads(1)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    network = MemoryLLMForCausalLM(MemoryLLMConfig(**{**defaults, **fields}))
    _fill(network, seed)
    network.to(getattr(torch, dtype)).save_pretrained(path)
    raw_byte_tokenizer().save(str(path / "tokenizer.json"))


def _fill(network: Any, seed: int, norm: float = 1.0) -> None:
    """Random weights of about unit gain, so that no layer is idle and logits are not flat.

    Those of norms are around ``norm``.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                # Scores that nothing else scales are kept from choosing one position each.
                unscaled = "k_norm" in name and hasattr(network.config, "num_kv_shared_layers")
                weight.copy_((norm + 0.2 * noise) * (weight.shape[0] ** -0.5 if unscaled else 1))
            elif "embed_tokens_per_layer" in name:
                weight.copy_(noise / network.config.hidden_size_per_layer_input**0.5)
            elif name in ("lm_head.weight", "model.embed_tokens.weight"):
                weight.copy_(noise * 2.5 / weight.shape[1] ** 0.5)
            elif "altup.modality_router" in name:  # divided by the width once more
                weight.copy_(noise * weight.shape[1] ** 0.5)
            elif "altup." in name:  # streams are a little of each other
                weight.copy_(noise * 0.2 / weight.shape[1] ** 0.5)
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)
        for name, buffer in network.named_buffers():
            if "layer_scalar" in name:
                buffer.copy_(0.3 + 0.8 * torch.rand(buffer.shape, generator=generator))


def raw_byte_tokenizer() -> Any:
    """One token per byte, then ``<s>``, ``</s>`` and ``<pad>``: any text, no training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return tokenizer


def change_config(checkpoint: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's config.json."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | fields))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 120,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": [257, 258],
    "pad_token_id": 258,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "head_dim": 16},
    "mistral": {"head_dim": 32, "sliding_window": 128},
    "qwen2": {"tie_word_embeddings": True, "bos_token_id": None},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    # Windows of 24, keys and values of the last three layers are those of the third and the fourth.
    "gemma4_text": {
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 300,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "sliding_window": 24,
        "final_logit_softcapping": 30.0,
        "layer_types": [
            f"{kind}_attention"
            for kind in ("sliding", "full", "sliding", "full", "sliding", "sliding", "full")
        ],
    },
    # As gemma4_text; the last ids have no row, and the first two layers have sparse gates.
    "gemma3n_text": {
        "num_hidden_layers": 7,
        "intermediate_size": [120, 120, 96, 120, 120, 144, 120],
        "head_dim": 16,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 280,
        "num_kv_shared_layers": 3,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.95, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0],
        "sliding_window": 24,
        "layer_types": [
            f"{kind}_attention"
            for kind in ("sliding", "full", "sliding", "full", "sliding", "sliding", "full")
        ],
    },
    "edge_memllm": {"beta": 8, "eos_token_id": 257},
}


def write_dense(path: Path, kind: str, seed: int = 0, **fields: Any) -> Path:
    """Write a checkpoint of a family with a byte-level tokenizer into the folder ``path``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    config = AutoConfig.for_model(kind, **{**SHAPE, **FAMILIES[kind], **fields})
    network = AutoModelForCausalLM.from_config(config)
    _fill(network, seed, norm=0.0 if kind == "gemma3_text" else 1.0)
    network.save_pretrained(path)
    raw_byte_tokenizer().save(str(path / "tokenizer.json"))
    return path
