"""The exporter: a trained checkpoint becomes an artifact, judged against the checkpoint.

Needs the `export` extra (torch, onnx-ir). Nothing that runs an artifact imports this package.
"""

from __future__ import annotations

from edge_memllm_export.exporter import ExportReport, export_model
from edge_memllm_export.ladder import Rung, verify_against
from edge_memllm_export.quality import Quality

__all__ = ["ExportReport", "Quality", "Rung", "export_model", "verify_against"]
