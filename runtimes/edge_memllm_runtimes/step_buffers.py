"""What a step of one shape reads and writes besides keys and values, on the host or on CUDA.

Buffers are made once for a shape and bound by address; a step then writes a few numbers (and, on
CUDA, copies the records over) and runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_memllm.records import RecordBuffer
from edge_memllm_runtimes.ort_graph import GraphShape
from edge_memllm_runtimes.ort_library import import_library

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a step: U distinct records, [B, T] tokens, K positions with logits."""

    distinct: int
    batch: int
    tokens: int
    wanted: int


@dataclass(frozen=True, slots=True)
class StepValues:
    """What is new in every step."""

    token_index: NDArray[np.int64]  # [B, T]
    logits_index: NDArray[np.int64]  # [B, K]
    totals: NDArray[np.int32]  # [B], positions with this step
    total: int  # the most positions the attention is laid out for, at least those of any sequence
    memory_gain: NDArray[np.float32] | None  # [L], None for the manifest's


class StepBuffers(Protocol):
    """Inputs and logits of steps of one shape."""

    def bind(self, binding: Any) -> None:
        """Bind everything by address."""

    def write(self, binding: Any, buffer: RecordBuffer, values: StepValues) -> None:
        """Bring in what is new. `buffer` holds the records."""

    def logits(self) -> Array:
        """Return what the last run left: [B, K, V], valid until the next write."""


class HostBuffers:
    """For a CPU: records are bound where they were read to, nothing is copied."""

    def __init__(self, graph: GraphShape, step: StepShape, buffer: RecordBuffer) -> None:
        self._gain = graph.memory_gain
        self._own_gain = True  # the manifest's gains are in place
        self._inputs = {
            **_small_inputs(graph, step),
            "total_sequence_length": np.zeros((), np.int32),
            **_records(buffer, step.distinct),
        }
        self._logits = np.zeros((step.batch, step.wanted, graph.vocab_size), graph.dtype)

    def bind(self, binding: Any) -> None:
        """Bind everything by address."""
        for name, array in self._inputs.items():
            binding.bind_input(name, *place(array))
        binding.bind_output("logits", *place(self._logits))

    def write(self, binding: Any, buffer: RecordBuffer, values: StepValues) -> None:
        """Write in place."""
        own_gain = values.memory_gain is None
        gain = () if own_gain and self._own_gain else self._gain
        for name, value in _small_values(values, gain):
            self._inputs[name][:] = value
        self._own_gain = own_gain
        self._inputs["total_sequence_length"][()] = values.total

    def logits(self) -> Array:
        """Return the array that is bound."""
        return self._logits


class CudaBuffers:
    """For CUDA: fixed places on the device, which the host's values are copied to."""

    def __init__(self, graph: GraphShape, step: StepShape, buffer: RecordBuffer) -> None:
        # The graph is not asked for no logits at all: its last operators would get empty tensors.
        self._wanted = step.wanted
        step = StepShape(step.distinct, step.batch, step.tokens, max(1, step.wanted))
        self._gain = graph.memory_gain
        self._distinct = step.distinct
        self._host = _small_inputs(graph, step)
        # GroupQueryAttention reads this one on the CPU.
        self._total = np.zeros((), np.int32)
        arrays = self._host | _records(buffer, step.distinct)
        self._inputs = {
            name: _on_device(array.shape, array.dtype) for name, array in arrays.items()
        }
        self._logits = _on_device((step.batch, step.wanted, graph.vocab_size), graph.dtype)

    def bind(self, binding: Any) -> None:
        """Bind everything by address."""
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("logits", self._logits)

    def write(self, binding: Any, buffer: RecordBuffer, values: StepValues) -> None:
        """Copy to the device, each to the place it always has."""
        for name, value in _small_values(values, self._gain):
            if value.size:  # no positions wanted: the first one stays asked for
                self._host[name][:] = value
            self._inputs[name].update_inplace(self._host[name])
        for name, records in _records(buffer, self._distinct).items():
            self._inputs[name].update_inplace(np.ascontiguousarray(records))
        self._total[()] = values.total
        # Should the library have copied it when it was bound, it gets the new value this way.
        binding.bind_input("total_sequence_length", *place(self._total))

    def logits(self) -> Array:
        """Copy to the host."""
        values: Array = self._logits.numpy()
        return values[:, : self._wanted]


def place(array: Array) -> tuple[str, int, type[np.generic], tuple[int, ...], int]:
    """Return what a binding wants to know of an array on the host."""
    return ("cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _small_inputs(graph: GraphShape, step: StepShape) -> dict[str, Array]:
    inputs: dict[str, Array] = {
        "token_index": np.zeros((step.batch, step.tokens), np.int64),
        "logits_index": np.zeros((step.batch, step.wanted), np.int64),
        "seqlens_k": np.zeros(step.batch, np.int32),
    }
    if graph.memory_gain:
        inputs["memory_gain"] = np.array(graph.memory_gain, graph.dtype)
    return inputs


def _small_values(values: StepValues, gain: tuple[float, ...]) -> Iterator[tuple[str, Array]]:
    yield "token_index", values.token_index
    yield "logits_index", values.logits_index
    yield "seqlens_k", values.totals - 1
    if gain:
        given = values.memory_gain
        yield "memory_gain", np.asarray(gain if given is None else given)


def _records(buffer: RecordBuffer, distinct: int) -> dict[str, Array]:
    return {"embedding": buffer.embedding(distinct), **buffer.wire(distinct)}


def _on_device(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    return import_library().OrtValue.ortvalue_from_shape_and_type(
        list(shape), dtype.type, "cuda", 0
    )
