"""The exporter: a trained checkpoint becomes an artifact, judged against the checkpoint.

Needs the `export` extra (torch, onnx-ir). Nothing that runs an artifact imports this package.
Names are imported when they are used, so that changing an artifact's codec loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_memllm_export.exporter import ExportReport, export_model
    from edge_memllm_export.judging.answers import Answers
    from edge_memllm_export.judging.ladder import ParityCheck, verify_against
    from edge_memllm_export.judging.quality import Quality
    from edge_memllm_export.requantizer import RequantizeReport, requantize
    from edge_memllm_export.row_changes import checkpoint_difference

__all__ = [
    "Answers",
    "ExportReport",
    "ParityCheck",
    "Quality",
    "RequantizeReport",
    "checkpoint_difference",
    "export_model",
    "requantize",
    "verify_against",
]

_HOMES = {
    "Answers": "judging.answers",
    "ExportReport": "exporter",
    "Quality": "judging.quality",
    "RequantizeReport": "requantizer",
    "ParityCheck": "judging.ladder",
    "checkpoint_difference": "row_changes",
    "export_model": "exporter",
    "requantize": "requantizer",
    "verify_against": "judging.ladder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
