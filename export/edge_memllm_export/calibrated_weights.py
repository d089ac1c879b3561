"""Quantising a graph's matrices by one of the methods: the exporter's choice made into a function.

A calibrated method reads the network's inputs to each matrix on a text; see `input_moments`.
"""

from __future__ import annotations

import numpy as np

from edge_memllm_export.calibration import text_tokens
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.gptq import Feedback
from edge_memllm_export.input_moments import InputMoments, Progress
from edge_memllm_export.matrix_forms import QuantizeMatrix
from edge_memllm_export.quantizer import quantize
from edge_memllm_export.texts import fitting_text

_TOKENS = 8192  # half or twice as many change nothing measurable


def matrix_quantizer(
    source: Checkpoint, method: str | None, text: str | None, progress: Progress
) -> QuantizeMatrix:
    """What quantises a graph's matrices, to be called in the graph's order.

    ``text`` is calibrated on, None takes the one that comes along; ``progress(layers done)`` is
    called by a calibrated method. Raises ExportError for a text that the model cannot read.
    """
    if method != "gptq":
        return quantize
    tokens = text_tokens(source, text, fitting_text(), _TOKENS)
    moments = InputMoments(source.network(), tokens, progress)

    def with_feedback(
        weight: np.ndarray, bits: int, block: int, scale_dtype: np.dtype, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        choose = Feedback(moments.of(name), bits, block)
        return quantize(weight, bits, block, scale_dtype, name, choose)

    return with_feedback
