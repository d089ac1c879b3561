"""ONNX Runtime on CPU or CUDA.

One session serves all threads; what belongs to one generation lies in its cache. Knows devices,
options and errors of the library; the graph's form is in `ort_graph`, its buffers in `ort_cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import ArtifactError, EdgeMemLLMError, RuntimeUnavailableError
from edge_memllm.records import RecordBuffer
from edge_memllm.runtime_protocol import KVCache
from edge_memllm_runtimes.ort_cache import OrtCache
from edge_memllm_runtimes.ort_graph import check_references, read_shape
from edge_memllm_runtimes.processors import physical_cores
from edge_memllm_runtimes.runtime import check_step, own_cache

if TYPE_CHECKING:
    from edge_memllm.artifact import Artifact

_PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # Grow by what is needed, not to the next power of two: the device is rarely ours alone.
    "cuda": ("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}),
}
# Every error comes back as an exception; the library need not write it to stderr as well.
_FATAL_ONLY = 4
_QUANTIZED_WEIGHTS = ("int4", "int8")


class OrtRuntime:
    """An artifact's graph in ONNX Runtime; see `edge_memllm.runtime_protocol.Runtime`."""

    def __init__(self, artifact: Artifact, device: str, threads: int | None = None) -> None:
        """Load the graph on "cpu" or "cuda"; `threads` None takes one per physical core.

        Raises `RuntimeUnavailableError` if the device cannot be had, `ArtifactError` if the graph
        is damaged or not the manifest's.
        """
        library = _import_library()
        _require_device(library, artifact, device)
        check_references(artifact)
        self.device = device
        self.name = f"onnxruntime {library.__version__}"
        where = str(artifact.path / artifact.manifest.graph.file)
        self._where = where
        self._session: Any = _open_session(library, artifact, device, threads, where)
        self._shape = read_shape(self._session, artifact.manifest, where)

    def new_cache(self, batch: int) -> OrtCache:
        """Return an empty cache; its memory grows with the text."""
        return OrtCache(self._open(), self._shape, self.device, batch)

    def step(
        self,
        buffer: RecordBuffer,
        distinct: int,
        token_index: NDArray[np.int64],
        cache: KVCache,
        logits_index: NDArray[np.int64] | None,
        *,
        sequence: int | None = None,
        memory_gain: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Append tokens and return logits; see `edge_memllm.runtime_protocol.Runtime`."""
        own = own_cache(cache, OrtCache)
        batch, tokens = token_index.shape
        if logits_index is None:
            logits_index = np.zeros((batch, 0), np.int64)
        check_step(token_index, distinct, own, logits_index, sequence)
        active = own.active(sequence)
        own.ensure(int(own.lengths[active].max()) + tokens)
        session = self._open()
        try:
            logits = own.bind(buffer, distinct, token_index, logits_index, sequence, memory_gain)
            _run(session, own.binding)
        except Exception as error:  # the library's exceptions share no base
            raise EdgeMemLLMError(
                f"{self._where}: ONNX Runtime failed on {self.device} in this step: {error}"
            ) from error
        own.lengths[active] += tokens
        return logits.astype(np.float32, copy=False)

    def close(self) -> None:
        """Let the session go; a step under way keeps it until it ends."""
        self._session = None

    def _open(self) -> Any:
        if self._session is None:
            raise EdgeMemLLMError(f"{self._where}: the runtime is closed. Load the model again.")
        return self._session


def _run(session: Any, binding: Any) -> None:
    binding.synchronize_inputs()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()


def _import_library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"This needs the package 'onnxruntime', which cannot be imported ({error}). "
            "Install it with: pip install 'edge-memllm'"
        ) from error
    return onnxruntime


def _require_device(library: Any, artifact: Artifact, device: str) -> None:
    """Raise `RuntimeUnavailableError` for what is known to be impossible before loading."""
    provider = _PROVIDERS[device][0]
    there = library.get_available_providers()
    if provider not in there:
        raise RuntimeUnavailableError(
            f"device '{device}' needs {provider}, this onnxruntime {library.__version__} has "
            f"{', '.join(there)}. Install it with: pip install 'edge-memllm[{device}]'"
        )
    dtype = artifact.manifest.graph.compute_dtype
    if device == "cuda" and dtype != "float16":
        raise RuntimeUnavailableError(
            f"device 'cuda' needs a graph that computes in float16, this one computes in {dtype}. "
            "Export with --graph-weights fp16, int8 or int4, or use the CPU."
        )


def _open_session(
    library: Any, artifact: Artifact, device: str, threads: int | None, where: str
) -> Any:
    library.disable_telemetry_events()
    if device != "cpu":  # the process-wide logger tells of missing libraries, as the error does
        library.set_default_logger_severity(_FATAL_ONLY)
    options = library.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = physical_cores() if threads is None else threads
    options.inter_op_num_threads = 1
    if device == "cpu" and artifact.manifest.graph.weights not in _QUANTIZED_WEIGHTS:
        # Packed copies of float weights are no faster and double the memory; quantised ones
        # would fall to a path a hundred times slower without theirs.
        options.add_session_config_entry("session.disable_prepacking", "1")
    provider = _PROVIDERS[device]
    try:
        # Without this the library prints on failure and goes on with another device.
        session = library.InferenceSession(
            where, options, providers=[provider], enable_fallback=False
        )
    except Exception as error:  # the library's exceptions share no base
        raise _refused(f"{where}: ONNX Runtime {library.__version__}", device, error) from error
    found = session.get_providers()[0]
    if found != provider[0]:
        raise _refused(where, device, f"it took {found} instead of {provider[0]}")
    return session


def _refused(where: str, device: str, reason: object) -> EdgeMemLLMError:
    """Return the error for a session that could not be made on this device."""
    if device == "cpu":
        return ArtifactError(
            f"{where} cannot load this graph: {reason}. "
            "Copy the artifact again, or export it again with this version."
        )
    return RuntimeUnavailableError(
        f"{where} cannot use the device '{device}': {reason}. Check the driver and its libraries "
        "(nvidia-smi), install with pip install 'edge-memllm[cuda]', or use the CPU."
    )
