"""A model whose memory counts more or less than it was trained to, layer by layer.

Its runtime is given gains of one's own in every step, so nothing is exported or loaded again, and
whatever takes a model measures it as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.manifest import Manifest
from edge_memllm.predictor import Predictor
from edge_memllm.record_source import RecordSource
from edge_memllm.records import RecordBuffer
from edge_memllm.runtime_protocol import KVCache, Runtime, StepLogits
from edge_memllm.tokenization import Tokenizer


class GainedRuntime:
    """A runtime with gains [L] in place of its model's; see `edge_memllm.runtime_protocol`."""

    def __init__(self, runtime: Runtime, gain: NDArray[np.float32]) -> None:
        """Take a runtime that stays the caller's to close."""
        self.name = runtime.name
        self.device = runtime.device
        self._runtime = runtime
        self._gain = gain

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache of the runtime's own."""
        return self._runtime.new_cache(batch)

    def step(
        self,
        buffer: RecordBuffer,
        distinct: int,
        token_index: NDArray[np.int64],
        cache: KVCache,
        logits_index: NDArray[np.int64] | None,
        *,
        sequence: int | range | None = None,
        memory_gain: NDArray[np.float32] | None = None,
    ) -> StepLogits:
        """Append tokens and return logits; gains that are given count in place of its own."""
        gain = self._gain if memory_gain is None else memory_gain
        return self._runtime.step(
            buffer, distinct, token_index, cache, logits_index, sequence=sequence, memory_gain=gain
        )

    def close(self) -> None:
        """Nothing to free: the runtime belongs to the caller."""


@dataclass(frozen=True)
class ScaledModel:
    """A model with another runtime; see `edge_memllm.predictor.Predictor`."""

    manifest: Manifest
    runtime: Runtime
    table: RecordSource
    tokenizer: Tokenizer
    prefill_chunk: int


def scaled_memory(model: Predictor, factors: Sequence[float]) -> ScaledModel:
    """Return a model whose layers' own gains are multiplied by `factors`, one for each layer.

    It is valid as long as `model` is open. Raises `RequestError` for a dense model, and for
    another number of factors.
    """
    spec = model.manifest.model
    if not spec.memory_layers:
        raise RequestError("This model is dense (beta 8): it has no memory whose gain could count.")
    if len(factors) != spec.num_hidden_layers:
        raise RequestError(
            f"{len(factors)} factors were given, expected one for each of the "
            f"{spec.num_hidden_layers} layers."
        )
    gain = np.asarray(spec.memory_gain, np.float32) * np.asarray(factors, np.float32)
    return ScaledModel(
        manifest=model.manifest,
        runtime=GainedRuntime(model.runtime, gain),
        table=model.table,
        tokenizer=model.tokenizer,
        prefill_chunk=model.prefill_chunk,
    )


def without_layer(model: Predictor, layer: int) -> list[float]:
    """Return the factors that turn one memory off: that of a layer, or the one all layers share."""
    spec = model.manifest.model
    if spec.memory_layers == 1:
        return [0.0] * spec.num_hidden_layers
    return [0.0 if each == layer else 1.0 for each in range(spec.num_hidden_layers)]
