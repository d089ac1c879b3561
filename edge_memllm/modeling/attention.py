"""Attention of one layer, from transformers: Llama's, or Qwen3's with norms of query and key."""

from __future__ import annotations

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from edge_memllm.modeling.configuration import MemoryLLMConfig


def build_attention(config: MemoryLLMConfig, layer: int) -> LlamaAttention | Qwen3Attention:
    """Attention with biases of query, key and value where the configuration has them.

    The output projection never has one, which Llama's own ``attention_bias`` gives it.
    """
    kind = Qwen3Attention if config.qk_norm else LlamaAttention
    attention = kind(config, layer)
    if config.attention_bias:
        output = attention.o_proj
        attention.o_proj = nn.Linear(output.in_features, output.out_features, bias=False)
    return attention
