"""What can be judged by its predictions: a loaded model, or one with something changed.

Perplexity, tasks and divergences take it. Knows no files and no command line.
"""

from __future__ import annotations

from typing import Protocol

from edge_memllm.manifest import Manifest
from edge_memllm.record_source import RecordSource
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.tokenization import Tokenizer


class Predictor(Protocol):
    """The part of `edge_memllm.Model` that predictions are made with; whoever opened it closes."""

    @property
    def manifest(self) -> Manifest:
        """What the model is."""

    @property
    def runtime(self) -> Runtime:
        """What computes."""

    @property
    def table(self) -> RecordSource:
        """Where records come from."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes tokens of text."""

    @property
    def prefill_chunk(self) -> int:
        """The most tokens of one prefill step."""
