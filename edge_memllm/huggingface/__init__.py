"""Artifacts in Hugging Face's classes: `generate` and pipelines of transformers, Optimum's tasks.

Needs the extra `optimum`. Importing this registers the classes with transformers' AutoConfig and
AutoModelForCausalLM, and the exporter with Optimum's TasksManager.
"""

from __future__ import annotations

from edge_memllm.errors import missing_extra

try:
    from transformers import AutoConfig, AutoModelForCausalLM

    from edge_memllm.huggingface.causal_lm import EdgeMemLLMConfig, EdgeMemLLMForCausalLM
    from edge_memllm.huggingface.tasks import EdgeMemLLMExporterConfig, register_tasks
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "optimum", "optimum") from error

AutoConfig.register(EdgeMemLLMConfig.model_type, EdgeMemLLMConfig)
AutoModelForCausalLM.register(EdgeMemLLMConfig, EdgeMemLLMForCausalLM)
register_tasks()

__all__ = ["EdgeMemLLMConfig", "EdgeMemLLMExporterConfig", "EdgeMemLLMForCausalLM"]
