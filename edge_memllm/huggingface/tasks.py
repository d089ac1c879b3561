"""Optimum's TasksManager learns that this family can be exported, and by whom.

Optimum looks up what an exporter can do by the backend's name, `edge-memllm`, and the model type.
"""

from __future__ import annotations

from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyTextInputGenerator, NormalizedTextConfig

from edge_memllm.modeling import MemoryLLMConfig

BACKEND = "edge-memllm"
_TASKS = ("text-generation", "text-generation-with-past")


class EdgeMemLLMExporterConfig(ExporterConfig):
    """What Optimum asks of an export: the checkpoint's inputs and outputs, and samples of them."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)
    SUPPORTS_PAST = True

    def __init__(self, config: MemoryLLMConfig, task: str, use_past: bool = False, **options: Any):
        """Take a checkpoint's configuration; an exported model always keeps its past."""
        super().__init__(config, task, **options)
        self.use_past = use_past

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Names of the inputs and of their axes."""
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"input_ids": axes, "attention_mask": axes}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Names of the outputs and of their axes."""
        return {"logits": {0: "batch_size", 1: "sequence_length"}}


def register_tasks() -> None:
    """Tell Optimum about the family's tasks; telling twice is fine."""
    register = TasksManager.create_register(BACKEND)
    register(MemoryLLMConfig.model_type, *_TASKS)(EdgeMemLLMExporterConfig)
