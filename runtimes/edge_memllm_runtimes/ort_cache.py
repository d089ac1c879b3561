"""Everything of one generation that ONNX Runtime works on: keys, values, buffers, the binding.

Inputs and outputs are bound by address and bound again only when an address or a shape changes,
so a decode step writes a few numbers in place and runs. Past and present are the same memory.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.records import RecordBuffer
from edge_memllm_runtimes.kv_cache import GrowingCache
from edge_memllm_runtimes.ort_graph import GraphShape, cache_names

Array = NDArray[Any]


class OrtCache(GrowingCache):
    """Keys and values of a batch on one device, with the binding that runs use."""

    def __init__(self, session: Any, shape: GraphShape, device: str, batch: int) -> None:
        super().__init__(batch, shape.context)
        self.binding = session.io_binding()
        self._shape = shape
        self._device = device
        self._tensors: dict[str, Any] = {}  # OrtValues [B, Hk, C, d], on the device
        self._bound_part: tuple[int, int | None] | None = None
        self._bound_step: tuple[RecordBuffer, int, tuple[int, int], int] | None = None
        self._inputs: dict[str, Array] = {}  # everything but keys and values, on the host
        self._logits = np.empty((0, 0, 0), shape.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        one = math.prod(self._shape.cache_shape(self.batch, self.capacity))
        return 2 * self._shape.layers * one * self._shape.dtype.itemsize

    def bind(
        self,
        buffer: RecordBuffer,
        distinct: int,
        token_index: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        sequence: int | None,
        memory_gain: NDArray[np.float32] | None,
    ) -> Array:
        """Prepare everything for one run and return the array that logits [B, K, V] go to.

        There must be room: `ensure` comes first.
        """
        self._bind_part(sequence)
        step = (buffer, distinct, token_index.shape, logits_index.shape[1])
        changed = step != self._bound_step
        if changed:
            self._bound_step = None  # so that a failure below leaves no half-made binding in use
            self._allocate(buffer, distinct, token_index.shape, logits_index.shape[1])
        totals = self.lengths[self.active(sequence)] + np.int32(token_index.shape[1])
        self._write(token_index, logits_index, totals, memory_gain)
        if changed or self._device != "cpu":  # what is on the host is copied when it is bound
            self._bind_inputs()
            self._bound_step = step
        return self._logits

    def _grow(self, capacity: int) -> None:
        # One tensor after the other: old and new together never take twice the memory.
        self._bound_part = None
        for name in cache_names(self._shape.layers):
            self._tensors[name] = self._grown(self._tensors.get(name), capacity)

    def _free(self) -> None:
        # First the bindings, which are addresses; then what lies there.
        self.binding.clear_binding_inputs()
        self.binding.clear_binding_outputs()
        self._tensors.clear()
        self._inputs.clear()
        self._bound_part = self._bound_step = None

    def _grown(self, old: Any, capacity: int) -> Any:
        from onnxruntime import OrtValue

        array = np.zeros(self._shape.cache_shape(self.batch, capacity), self._shape.dtype)
        if old is not None:
            array[:, :, : self.capacity] = old.numpy()
        return OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _bind_part(self, sequence: int | None) -> None:
        """Bind past and present to the whole cache, or to one sequence's slice of it."""
        if self._bound_part == (self.capacity, sequence):
            return
        batch, first = (self.batch, 0) if sequence is None else (1, sequence)
        shape = self._shape.cache_shape(batch, self.capacity)
        offset = first * math.prod(shape[1:]) * self._shape.dtype.itemsize
        for name, tensor in self._tensors.items():
            place = (self._device, 0, self._shape.dtype.type, shape, tensor.data_ptr() + offset)
            self.binding.bind_input(f"past_key_values.{name}", *place)
            self.binding.bind_output(f"present.{name}", *place)
        self._bound_part = (self.capacity, sequence)

    def _allocate(
        self, buffer: RecordBuffer, distinct: int, steps: tuple[int, ...], wanted: int
    ) -> None:
        """Make the arrays of a step of this shape; those of records are the buffer's own."""
        batch = steps[0]
        self._inputs = {
            "token_index": np.zeros(steps, np.int64),
            "logits_index": np.zeros((batch, wanted), np.int64),
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "embedding": buffer.embedding(distinct),
            **buffer.wire(distinct),
        }
        if self._shape.memory_gain:
            self._inputs["memory_gain"] = np.array(self._shape.memory_gain, self._shape.dtype)
        self._logits = np.zeros((batch, wanted, self._shape.vocab_size), self._shape.dtype)
        self.binding.bind_output("logits", *_place(self._logits))

    def _write(
        self,
        token_index: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        totals: NDArray[np.int32],
        memory_gain: NDArray[np.float32] | None,
    ) -> None:
        inputs = self._inputs
        inputs["token_index"][:] = token_index
        inputs["logits_index"][:] = logits_index
        inputs["seqlens_k"][:] = totals - 1
        inputs["total_sequence_length"][()] = totals.max()
        if self._shape.memory_gain:
            gain = self._shape.memory_gain if memory_gain is None else memory_gain
            inputs["memory_gain"][:] = gain

    def _bind_inputs(self) -> None:
        for name, array in self._inputs.items():
            self.binding.bind_input(name, *_place(array))


def _place(array: Array) -> tuple[str, int, type[np.generic], tuple[int, ...], int]:
    return ("cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
