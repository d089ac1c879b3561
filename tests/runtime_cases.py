"""Exports and comparisons that the tests of runtimes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import CONTEXT

from edge_memllm.feeding import Feeder
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table import Table

TEXT = list(b"Whatever runs here computes the same for one text.")
LONG = [(7 * n + n // 50) % 250 for n in range(300)]


@dataclass(frozen=True)
class Case:
    """A runtime with the table it is fed from, and how equal its results are among themselves."""

    runtime: Runtime
    table: Table
    same: Callable[[np.ndarray, np.ndarray], None]


def exactly(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found, expected)


def closely(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4)


def in_effect(found: np.ndarray, expected: np.ndarray) -> None:
    """Half precision: the same distribution, to a hundredth of what quantisation costs."""
    first, second = log_softmax(expected), log_softmax(found)
    assert (np.exp(first) * (first - second)).sum(axis=-1).mean() < 1e-3


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


ARTIFACTS: dict[str, dict[str, Any]] = {
    "fp32": {"graph_weights": "fp32", "table_codec": "f32"},
    "fp32 flex grouped": {
        "graph_weights": "fp32",
        "table_codec": "int8",
        "beta": 2,
        "num_key_value_heads": 2,
    },
    "fp32 dense": {"graph_weights": "fp32", "beta": 8},
    "fp16": {"graph_weights": "fp16", "table_codec": "f16"},
    "int8": {"graph_weights": "int8", "table_codec": "int4"},
    "int4": {"graph_weights": "int4", "table_codec": "int8"},
}


def torch_reference(checkpoint: Path, **fields: Any) -> Runtime:
    from edge_memllm.modeling import MemoryLLMForCausalLM
    from edge_memllm_runtimes.torch_reference import TorchReference

    return TorchReference(MemoryLLMForCausalLM.from_pretrained(checkpoint, **fields))


def scores(case: Case, ids: list[int], chunk: int = CONTEXT) -> np.ndarray:
    """Logits [T, V] of all positions of a text."""
    with Feeder(case.runtime, case.table, 1, chunk) as feeder:
        parts = [
            feeder.score(0, ids[begin : begin + chunk]).copy()
            for begin in range(0, len(ids), chunk)
        ]
    return np.concatenate(parts)
