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
from edge_memllm_runtimes.cuda_graphs import CudaGraphs
from edge_memllm_runtimes.kv_cache import GrowingCache, KVBudget
from edge_memllm_runtimes.ort_graph import GraphShape, cache_names
from edge_memllm_runtimes.step_buffers import (
    CudaBuffers,
    HostBuffers,
    StepBuffers,
    StepShape,
    StepValues,
)


class OrtCache(GrowingCache):
    """Keys and values of a batch on one device, with the binding that runs use."""

    def __init__(
        self,
        session: Any,
        shape: GraphShape,
        device: str,
        batch: int,
        *,
        budget: KVBudget | None = None,
        graphs: CudaGraphs | None = None,
    ) -> None:
        super().__init__(
            batch, shape.context, position_bytes=shape.cache_bytes(1, 1), budget=budget
        )
        self.binding = session.io_binding()
        self._shape = shape
        self._device = device
        self._graphs = graphs
        self._tensors: dict[str, Any] = {}  # OrtValues [B, Hk, C, d], on the device
        self._bound_part: tuple[int, int | None] | None = None
        self._bound_step: tuple[RecordBuffer | None, StepShape] | None = None
        self._buffers: StepBuffers | None = None
        self._kept: dict[StepShape, StepBuffers] = {}  # of decode steps that are replayed

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._shape.cache_bytes(self.batch, self.capacity)

    def bind(
        self,
        buffer: RecordBuffer,
        distinct: int,
        token_index: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        sequence: int | None,
        memory_gain: NDArray[np.float32] | None,
    ) -> tuple[StepBuffers, Any]:
        """Prepare one run; return its buffers, which logits come from, and its run options.

        There must be room: `ensure` comes first.
        """
        batch, tokens = token_index.shape
        replay = self._graphs is not None and sequence is None and tokens == 1
        if replay:  # one shape for every step: records beyond the distinct ones are not looked at
            distinct = min(batch, buffer.capacity)
        step = StepShape(distinct, batch, tokens, logits_index.shape[1])
        self._bind_part(sequence)
        buffers = self._bound_buffers(buffer, step, replay)
        totals = self.lengths[self.active(sequence)] + np.int32(tokens)
        # A recording keeps the layout it was made with, so that must do for the whole capacity.
        total = self.capacity if replay else int(totals.max())
        values = StepValues(token_index, logits_index, totals, total, memory_gain)
        buffers.write(self.binding, buffer, values)
        return buffers, self._run_options(step, replay)

    def _grow(self, capacity: int) -> None:
        # One tensor after the other: old and new together never take twice the memory.
        self._bound_part = None
        self._void_recordings()
        for name in cache_names(self._shape.layers):
            self._tensors[name] = self._grown(self._tensors.get(name), capacity)

    def _free(self) -> None:
        # First the bindings, which are addresses; then what lies there.
        self.binding.clear_binding_inputs()
        self.binding.clear_binding_outputs()
        self._tensors.clear()
        self._kept.clear()
        self._buffers = self._bound_part = self._bound_step = None

    def _grown(self, old: Any, capacity: int) -> Any:
        from onnxruntime import OrtValue

        array = np.zeros(self._shape.cache_shape(self.batch, capacity), self._shape.kv_dtype)
        if old is not None:
            array[:, :, : self.capacity] = old.numpy()
        return OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _bind_part(self, sequence: int | None) -> None:
        """Bind past and present to the whole cache, or to one sequence's slice of it."""
        if self._bound_part == (self.capacity, sequence):
            return
        batch, first = (self.batch, 0) if sequence is None else (1, sequence)
        shape = self._shape.cache_shape(batch, self.capacity)
        offset = first * math.prod(shape[1:]) * self._shape.kv_dtype.itemsize
        for name, tensor in self._tensors.items():
            place = (self._device, 0, self._shape.kv_dtype.type, shape, tensor.data_ptr() + offset)
            self.binding.bind_input(f"past_key_values.{name}", *place)
            self.binding.bind_output(f"present.{name}", *place)
        self._bound_part = (self.capacity, sequence)

    def _bound_buffers(self, buffer: RecordBuffer, step: StepShape, keep: bool) -> StepBuffers:
        """Return bound buffers for a step; on a CPU they are tied to where records were read."""
        tied = (buffer if self._device == "cpu" else None, step)
        if self._buffers is not None and self._bound_step == tied:
            return self._buffers
        self._bound_step = None  # so that a failure below leaves no half-made binding in use
        buffers = self._kept.get(step) if keep else None
        if buffers is None:
            self._void_recordings()
            kind = HostBuffers if self._device == "cpu" else CudaBuffers
            buffers = kind(self._shape, step, buffer)
        if keep:
            self._kept[step] = buffers
        buffers.bind(self.binding)
        self._buffers, self._bound_step = buffers, tied
        return buffers

    def _run_options(self, step: StepShape, replay: bool) -> Any:
        if self._graphs is None:
            return None
        if not replay:
            return self._graphs.plain()
        return self._graphs.replayable((id(self), self.capacity, step))

    def _void_recordings(self) -> None:
        if self._graphs is not None:
            self._graphs.void()
