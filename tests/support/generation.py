"""One text from a table and a runtime, without a model around them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from edge_memllm.engine.feeding import Feeder
from edge_memllm.engine.generation import TokenSequence, generate_tokens


def tokens_of(
    runtime: Any,
    table: Any,
    sequence: TokenSequence,
    *,
    prefill_chunk: int = 128,
    speculate: int = 0,
    costs: Any = None,
) -> Generator[int, None, None]:
    """Compute the prompt of a sequence, and yield its new tokens."""
    with Feeder(runtime, table, 1, prefill_chunk, costs) as feeder:
        logits = feeder.prefill(0, sequence.prompt)
        yield from generate_tokens(feeder, sequence, logits, speculate)
