"""Tiny random checkpoints of the dense families that are converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import _byte_tokenizer, _fill
from transformers import AutoConfig, AutoModelForCausalLM

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
    "edge_memllm": {"beta": 8, "eos_token_id": 257},
}


def write_dense(path: Path, kind: str, seed: int = 0, **fields: Any) -> Path:
    """Write a checkpoint of a family with a byte-level tokenizer into the folder ``path``."""
    torch.set_num_threads(1)
    config = AutoConfig.for_model(kind, **{**SHAPE, **FAMILIES[kind], **fields})
    network = AutoModelForCausalLM.from_config(config)
    _fill(network, seed)
    network.save_pretrained(path)
    _byte_tokenizer().save(str(path / "tokenizer.json"))
    return path
