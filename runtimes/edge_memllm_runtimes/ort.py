"""ONNX Runtime on CPU or CUDA.

One session serves all threads; what belongs to one generation lies in its cache. Devices and
options are in `ort_session`, the graph's form in `ort_graph`, its buffers in `ort_cache`.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.process.memory_account import MemoryShare
from edge_memllm.runtime_protocol import KVCache, StepLogits
from edge_memllm_runtimes.cpu_graph import computed_dtype
from edge_memllm_runtimes.kv_cache import KVBudget, check_step, own_cache
from edge_memllm_runtimes.options import RuntimeOptions
from edge_memllm_runtimes.ort_cache import CudaGraphs, OrtCache
from edge_memllm_runtimes.ort_graph import GraphShape, read_checked_graph, rewritten
from edge_memllm_runtimes.ort_library import import_library
from edge_memllm_runtimes.ort_session import (
    open_packed,
    open_session,
    pack_graph,
    require_device,
)
from edge_memllm_runtimes.own_kernels import OwnKernels, kernels_for
from edge_memllm_runtimes.packed_weights import forget_originals, packed_graph

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact


class Home:
    """The process that a session was made in, if it can be used in that one only."""

    def __init__(self, session: Any, device: str) -> None:
        self._process = os.getpid()
        threads = session.get_session_options().intra_op_num_threads
        self._bound = device != "cpu" or threads != 1
        if self._bound:
            _never_freed_in_a_child().add(session)

    def check(self, where: str) -> None:
        """Raise `EdgeMemLLMError` in a process that has not what the session computes with."""
        if self._bound and os.getpid() != self._process:
            raise EdgeMemLLMError(
                f"{where}: was loaded before this process was forked, and the threads that compute "
                "are the parent's. Load the model in each process, or with threads=1 on the CPU, "
                "which needs no others; or start processes by 'spawn' or 'forkserver'."
            )


@cache
def _never_freed_in_a_child() -> WeakSet[Any]:
    sessions: WeakSet[Any] = WeakSet()

    def keep() -> None:
        for session in list(sessions):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=keep)
    return sessions


class OrtRuntime:
    """An artifact's graph in ONNX Runtime; see `edge_memllm.runtime_protocol.Runtime`."""

    def __init__(
        self, artifact: Artifact, device: str, options: RuntimeOptions | None = None
    ) -> None:
        """Load the graph on "cpu" or "cuda".

        Raises `RuntimeUnavailableError` if the device cannot be had, `ArtifactError` if the graph
        is damaged or not the manifest's, `RequestError` for an option the device does not have.
        """
        options = options or RuntimeOptions()
        options.check_device(device)
        require_device(artifact, device)
        self.device = device
        dtype = computed_dtype(artifact.manifest, device, own_dtype=options.own_dtype)
        kernels = kernels_for(device, dtype, options)
        self.name = f"onnxruntime {import_library().__version__}"
        if kernels is not None:
            self.name += f" with {kernels.name}"
        self._where = str(artifact.path / artifact.manifest.graph.file)
        self._session: Any = _session(artifact, device, dtype, options, kernels)
        self._home = Home(self._session, device)
        self._shape = GraphShape.of(artifact.manifest, device, own_dtype=options.own_dtype)
        self._budget = _budget(options)
        self._graphs = CudaGraphs(self._session) if options.cuda_graph else None
        # Nothing may touch the device while a graph is recorded, and a replay works in memory
        # that other runs use as well: one step at a time then.
        self._turn: AbstractContextManager[Any] = Lock() if self._graphs else nullcontext()

    def new_cache(self, batch: int) -> OrtCache:
        """Return an empty cache; its memory grows with the text."""
        return OrtCache(
            self._open(), self._shape, self.device, batch, budget=self._budget, graphs=self._graphs
        )

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
        """Append tokens and return logits; see `edge_memllm.runtime_protocol.Runtime`."""
        own = own_cache(cache, OrtCache)
        batch, tokens = token_index.shape
        if logits_index is None:
            logits_index = np.zeros((batch, 0), np.int64)
        check_step(token_index, distinct, own, logits_index, sequence)
        active = own.active(sequence)
        session = self._open()
        with self._turn:
            totals = own.lengths[active] + np.int32(tokens)
            own.ensure(max(totals.tolist()))
            try:
                buffers, how = own.bind(
                    buffer, distinct, token_index, logits_index, totals, sequence, memory_gain
                )
                _run(session, own.binding, how, self.device)
                logits: StepLogits = buffers.logits()[:, : logits_index.shape[1]]
            except Exception as error:  # the library's exceptions share no base
                if own.moves(sequence, tokens):
                    own.close()  # some layers' rows may have moved, others not
                raise EdgeMemLLMError(
                    f"{self._where}: ONNX Runtime failed on {self.device} in this step: {error}"
                ) from error
        own.lengths[active] = totals
        return logits

    def close(self) -> None:
        """Let the session go; a step under way keeps it until it ends."""
        self._session = None

    def _open(self) -> Any:
        if self._session is None:
            raise EdgeMemLLMError(f"{self._where}: the runtime is closed. Load the model again.")
        self._home.check(self._where)
        return self._session


def _session(
    artifact: Artifact,
    device: str,
    dtype: str,
    options: RuntimeOptions,
    kernels: OwnKernels | None,
) -> Any:
    if options.packed_cache is None:
        checked = read_checked_graph(artifact, own=options.own_files)
        if device == "cpu":
            floats = dtype != artifact.manifest.graph.compute_dtype
            bits = () if kernels is None else kernels.input_bits
            checked = rewritten(checked, floats=floats, input_bits=bits)
        return open_session(checked, artifact, device, options, kernels)
    graph = packed_graph(
        options.packed_cache,
        artifact,
        import_library().__version__,
        lambda stored, folder: pack_graph(stored, artifact, options, folder, kernels),
        kernels=kernels,
        unasked=options.packed_unasked,
        progress=options.progress,
    )
    session = open_packed(graph, artifact, options, kernels)
    forget_originals(graph)
    return session


def _budget(options: RuntimeOptions) -> KVBudget | MemoryShare | None:
    if options.memory_share is not None:
        return options.memory_share
    return None if options.kv_bytes is None else KVBudget(options.kv_bytes, options.score_bytes)


def _run(session: Any, binding: Any, how: Any, device: str) -> None:
    if device == "cpu":  # nothing is copied, so there is nothing to wait for
        session.run_with_iobinding(binding, how)
        return
    binding.synchronize_inputs()
    session.run_with_iobinding(binding, how)
    binding.synchronize_outputs()
