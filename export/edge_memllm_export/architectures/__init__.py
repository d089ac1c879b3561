"""The families of models that can be exported, one file each, found by `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_memllm.errors import ExportError
from edge_memllm_export.architectures import gemma3, gemma3n, gemma4, llama, memoryllm
from edge_memllm_export.architectures.architecture import Architecture, Source

# The word for a family in config.json -> what makes a model of it out of a source.
ARCHITECTURES: dict[str, Callable[[Source], Architecture]] = {
    memoryllm.MODEL_TYPE: memoryllm.MemoryLLM,
    **dict.fromkeys(llama.MODEL_TYPES, llama.Llama),
    **dict.fromkeys(gemma3.MODEL_TYPES, gemma3.Gemma3),
    **dict.fromkeys(gemma3n.MODEL_TYPES, gemma3n.Gemma3n),
    **dict.fromkeys(gemma4.MODEL_TYPES, gemma4.Gemma4),
}


def open_architecture(source: Source) -> Architecture:
    """The model that a source describes.

    Raises ExportError for a family that is not known here, UnusableCheckpointError for weights or a
    configuration that no network of its family has.
    """
    found: Any = source.fields.get("model_type")
    if not isinstance(found, str) or found not in ARCHITECTURES:
        known = " or ".join(repr(name) for name in ARCHITECTURES)
        raise ExportError(
            f"{source.where}: model_type is {found!r}, expected {known}. Only checkpoints of these "
            "families can be exported."
        )
    return ARCHITECTURES[found](source)
