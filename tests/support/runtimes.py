"""Exports and comparisons that the tests of runtimes share, and CUDA where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm.engine.feeding import Feeder
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.table import Table
from support.checkpoints import CONTEXT

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


def in_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU compute graphs in the dtype they are stored in, as an accelerator does."""
    for module in ("ort", "ort_graph"):
        monkeypatch.setattr(
            f"edge_memllm_runtimes.{module}.computed_dtype",
            lambda manifest, *_, **__: manifest.graph.compute_dtype,
        )


def pretend_cuda(patch: pytest.MonkeyPatch) -> list[str]:
    """Let "cuda" stand for the CPU. Returns the list that gpu_graph_id of every run goes into."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_inference_collection as library

    from edge_memllm_runtimes import ort_cache as cuda_graphs
    from edge_memllm_runtimes import ort_session

    make, from_numpy = library.OrtDevice.make, library.OrtValue.ortvalue_from_numpy

    def device(name: str, *rest: Any) -> Any:
        return make("cpu" if name == "cuda" else name, *rest)

    def on_host(array: Any, *_: Any) -> Any:
        return from_numpy(array, "cpu", 0)

    entries = ort_session._entries
    ran: list[str] = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def noted(session: Any, binding: Any, options: Any = None) -> None:
        # The library gives no way to read an entry back; the runtime's own object remembers it.
        ran.append("none" if options is None else numbers[id(options)])
        run(session, binding, options)

    numbers: dict[int, str] = {}
    make_options = cuda_graphs._run_options

    def remembered(number: int) -> Any:
        options = make_options(number)
        numbers[id(options)] = str(number)
        kept.append(options)  # so that an id stands for one object
        return options

    kept: list[Any] = []
    patch.setattr(cuda_graphs, "_run_options", remembered)
    patch.setattr(library.OrtDevice, "make", staticmethod(device))
    patch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", staticmethod(on_host))
    patch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", noted)
    patch.setattr(ort_session, "_PROVIDERS", dict.fromkeys(("cpu", "cuda"), "CPUExecutionProvider"))
    patch.setattr(ort_session, "_provider_options", lambda *_: {})
    patch.setattr(ort_session, "_entries", lambda artifact, _: entries(artifact, "cpu"))
    return ran
