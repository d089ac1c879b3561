"""The trainable side of the family: configuration, network, presets, training. Needs torch.

Importing this registers the classes with Hugging Face's AutoConfig and AutoModelForCausalLM.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from edge_memllm.modeling.configuration import (
    PRESETS,
    MemoryLLMConfig,
    parameter_counts,
    preset_config,
)
from edge_memllm.modeling.network import MemoryLLMForCausalLM, MemoryLLMModel, TokenRows

AutoConfig.register(MemoryLLMConfig.model_type, MemoryLLMConfig)
AutoModel.register(MemoryLLMConfig, MemoryLLMModel)
AutoModelForCausalLM.register(MemoryLLMConfig, MemoryLLMForCausalLM)

__all__ = [
    "PRESETS",
    "MemoryLLMConfig",
    "MemoryLLMForCausalLM",
    "MemoryLLMModel",
    "TokenRows",
    "parameter_counts",
    "preset_config",
]
