"""Everything of one generation that ONNX Runtime works on: keys, values, buffers, the binding.

Inputs and outputs are bound by address and bound again only when an address or a shape changes,
so a decode step writes a few numbers in place and runs. Past and present are the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.process.memory_account import MemoryShare
from edge_memllm.runtime_protocol import KVState, KVStateLayout
from edge_memllm_runtimes.kv_cache import GrowingCache, KVBudget, Mark, RollingWindow, cache_names
from edge_memllm_runtimes.ort_graph import GraphShape
from edge_memllm_runtimes.ort_library import import_library

Array = NDArray[Any]

_NO_RECORDING = -1
_RUN_ENTRY = "gpu_graph_id"


class StepShape(NamedTuple):
    """The sizes of a step: U distinct records, [B, T] tokens, K positions with logits."""

    distinct: int
    batch: int
    tokens: int
    wanted: int


class StepValues(NamedTuple):
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
        return values


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


class CudaGraphs:
    """The recordings of one session. Not thread-safe: steps take turns."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._numbers = count(1)
        self._recorded: dict[Hashable, tuple[int, Any]] = {}
        self._plain = _run_options(_NO_RECORDING)

    def plain(self) -> Any:
        """Return the run options of a step that is neither recorded nor replayed."""
        return self._plain

    def replayable(self, step: Hashable) -> Any:
        """Return the run options of a step that is recorded, and later replayed, as `step`.

        `step` stands for everything fixed in the recording: buffers, shapes, capacity.
        """
        if step not in self._recorded:
            number = next(self._numbers)
            self._recorded[step] = (number, _run_options(number))
        return self._recorded[step][1]

    def void(self) -> None:
        """Forget every recording: memory of the device was given out for good."""
        for number, _ in self._recorded.values():
            self._session.release_captured_graph(number)
        self._recorded.clear()


def _run_options(number: int) -> Any:
    options = import_library().RunOptions()
    options.add_run_config_entry(_RUN_ENTRY, str(number))
    return options


class OrtCache(GrowingCache):
    """Keys and values of a batch on one device, with the binding that runs use."""

    def __init__(
        self,
        session: Any,
        shape: GraphShape,
        device: str,
        batch: int,
        *,
        budget: KVBudget | MemoryShare | None = None,
        graphs: CudaGraphs | None = None,
    ) -> None:
        window_bytes = shape.cache_bytes(0)
        windows = {
            each.window: RollingWindow(each.window, rows, batch)
            for each in shape.caches
            if each.window is not None and (rows := shape.rolling_rows(each)) is not None
        }
        super().__init__(
            batch,
            shape.context,
            position_bytes=shape.cache_bytes(1) - window_bytes,
            window_bytes=window_bytes,
            windows=windows.values(),
            budget=budget,
        )
        self._window_of = {  # None where all positions are kept
            name: windows[each.window] if each.rolling and each.window is not None else None
            for each in shape.caches
            for name in cache_names(each)
        }
        self.copies = device == "cpu"  # the library moves no part of a tensor on a device
        self.binding: Any = session.io_binding()
        self._shape = shape
        self._device = device
        self._graphs = graphs
        self._grown_bytes = 0
        # Some operators take no empty tensors: all on CUDA, and attention of layers that see wanted
        # positions alone. So those are asked for one when none is wanted.
        self._asks_always = device != "cpu" or shape.keeps_less
        self._tensors: dict[str, Any] = {}  # OrtValues [B, Hk, C or R, d], on the device
        self._bound_part: tuple[int, int | range | None] | None = None
        self._bound_step: tuple[RecordBuffer | None, StepShape] | None = None
        self._buffers: StepBuffers | None = None
        self._kept: dict[StepShape, StepBuffers] = {}  # of decode steps that are replayed

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._mark_bytes + (self._grown_bytes if self.capacity else 0)

    def bind(
        self,
        buffer: RecordBuffer,
        distinct: int,
        token_index: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        totals: NDArray[np.int32],
        sequence: int | range | None,
        memory_gain: NDArray[np.float32] | None,
    ) -> tuple[StepBuffers, Any]:
        """Prepare one run; return its buffers, which logits come from, and its run options.

        `totals` [B] are the positions with this step. There must be room: `ensure` comes first.
        """
        batch, tokens = token_index.shape
        replay = self._graphs is not None and sequence is None and tokens == 1
        if replay:  # one shape for every step: records beyond the distinct ones are not looked at
            distinct = min(batch, buffer.capacity)
        if not logits_index.size and self._asks_always:
            logits_index = np.full((batch, 1), tokens - 1)
        step = StepShape(distinct, batch, tokens, logits_index.shape[1])
        self._bind_part(sequence, batch)
        buffers = self._bound_buffers(buffer, step, replay)
        # A recording keeps the layout it was made with, so that must do for the whole capacity.
        total = self.capacity if replay else max(totals.tolist())
        values = StepValues(token_index, logits_index, totals, total, memory_gain)
        buffers.write(self.binding, buffer, values)
        return buffers, self._run_options(step, replay)

    def _grow(self, capacity: int) -> None:
        # One tensor after the other: old and new together never take twice the memory.
        self._bound_part = None
        self._void_recordings()
        for name, shape in self._shape.cache_shapes(self.batch, capacity).items():
            self._tensors[name] = self._grown(self._tensors.get(name), shape)
        self._grown_bytes = self.batch * self._shape.cache_bytes(capacity)  # asked for in each step

    def _copy(self, sequence: int, source: int, length: int, mark: Mark | None) -> None:
        held = int(self.lengths[source])
        for name, values, window in self._on_host():
            if window is None:
                values[sequence, :, :length] = values[source, :, :length]
            elif mark is None:
                first = window.lowest(source, held)
                there, here = (window.rows(each, first, length) for each in (held, length))
                values[sequence, :, here] = values[source, :, there]
            else:
                first = mark.first[self.windows.index(window)]
                kept = mark.rows[name][:, : length - first]
                values[sequence, :, window.rows(length, first, length)] = kept

    def _window_rows(self, sequence: int, first: tuple[int, ...]) -> KVState:
        length = int(self.lengths[sequence])
        firsts = dict(zip(self.windows, first, strict=True))
        return {
            name: values[sequence, :, window.rows(length, firsts[window], length)].copy()
            for name, values, window in self._on_host()
            if window is not None
        }

    def _swap(self, first: int, second: int) -> None:
        length = int(max(self.lengths[first], self.lengths[second]))
        for _, values, _ in self._on_host():  # rolling ones have fewer rows, and all are exchanged
            both = values[[second, first], :, :length]  # a copy
            values[first, :, :length], values[second, :, :length] = both

    def state_layout(self, length: int) -> KVStateLayout:
        """Return [Hk, T, d] for all keys and values, of rolling ones what is looked at next."""
        return {
            name: (self._shape.kv_dtype, (heads, length - self._first_saved(name, length), width))
            for name, (_, heads, _, width) in self._shape.cache_shapes(1, length).items()
        }

    def _state(self, sequence: int, length: int) -> KVState:
        if not self._tensors:
            return {
                name: np.empty(shape, kind) for name, (kind, shape) in self.state_layout(0).items()
            }
        return {
            name: tensor.numpy()[sequence, :, self._saved_rows(name, length)]
            for name, tensor in self._tensors.items()
        }

    def _load_state(self, sequence: int, length: int, state: KVState) -> None:
        for name, tensor in self._tensors.items():
            array = tensor.numpy()  # on a CPU where it lies, else a copy
            array[sequence, :, self._saved_rows(name, length)] = state[name]
            if self._device != "cpu":
                tensor.update_inplace(array)

    def _first_saved(self, name: str, length: int) -> int:
        """Return the first position that `state` gives of a sequence of `length`."""
        window = self._window_of[name]
        return 0 if window is None else window.looked_at(length)

    def _saved_rows(self, name: str, length: int) -> slice:
        """Return in which rows lies what `state` gives."""
        window = self._window_of[name]
        first = self._first_saved(name, length)
        return slice(first, length) if window is None else window.rows(length, first, length)

    def _on_host(self) -> Iterator[tuple[str, NDArray[Any], RollingWindow | None]]:
        """Yield keys and values [B, Hk, C or R, d] where they lie, in the memory of the CPU."""
        for name, tensor in self._tensors.items():
            yield name, tensor.numpy(), self._window_of[name]

    def _free(self) -> None:
        # First the bindings, which are addresses; then what lies there.
        if self.binding is not None:
            self.binding.clear_binding_inputs()
            self.binding.clear_binding_outputs()
        self.binding = None  # it would keep the library's session, and so all weights
        self._tensors.clear()
        self._kept.clear()
        self._buffers = self._bound_part = self._bound_step = None

    def _grown(self, old: Any, shape: tuple[int, ...]) -> Any:
        if old is not None and tuple(old.shape()) == shape:  # a rolling one never grows
            return old
        array = np.zeros(shape, self._shape.kv_dtype)
        if old is not None:
            array[:, :, : self.capacity] = old.numpy()
        return import_library().OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _bind_part(self, sequence: int | range | None, batch: int) -> None:
        """Bind past and present to the whole cache, or to the slice of some sequences."""
        if self._bound_part == (self.capacity, sequence):
            return
        first = self.active(sequence).start or 0
        kind = self._shape.kv_dtype
        places = {}
        for name, shape in self._shape.cache_shapes(batch, self.capacity).items():
            address = self._tensors[name].data_ptr() + first * math.prod(shape[1:]) * kind.itemsize
            place = places[name] = (self._device, 0, kind.type, shape, address)
            self.binding.bind_input(f"past_key_values.{name}", *place)
            self.binding.bind_output(f"present.{name}", *place)
        for name, cache in self._shape.rewritten:
            self.binding.bind_output(f"present.{name}", *places[cache])
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
