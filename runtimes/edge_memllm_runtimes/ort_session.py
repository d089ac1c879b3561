"""Sessions of ONNX Runtime: the library, its devices, its options, and its errors in our words.

Knows no graph inputs and no generation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_memllm.artifact.manifest import QUANTISED_WEIGHTS
from edge_memllm.errors import ArtifactError, EdgeMemLLMError, RuntimeUnavailableError
from edge_memllm_runtimes.options import RuntimeOptions, physical_cores
from edge_memllm_runtimes.ort_library import import_library

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact
    from edge_memllm_runtimes.ort_graph import CheckedGraph
    from edge_memllm_runtimes.own_kernels import OwnKernels


_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Every error comes back as an exception; the library need not write it to stderr as well.
_FATAL_ONLY = 4
# The library's words when a node found no kernel on the device.
_ON_CPU = ("fallback to CPU EP", "nodes have not been")


def require_device(artifact: Artifact, device: str) -> None:
    """Raise `RuntimeUnavailableError` for what is known to be impossible before loading."""
    library = import_library()
    provider = _PROVIDERS[device]
    there = library.get_available_providers()
    if provider not in there:
        minor = library.__version__.rpartition(".")[0]
        raise RuntimeUnavailableError(
            f"device '{device}' needs {provider}, this onnxruntime {library.__version__} has "
            f"{', '.join(there)}. Put the library for GPUs in its place: pip uninstall "
            f"onnxruntime, then pip install 'onnxruntime-gpu=={minor}.*'"
        )
    dtype = artifact.manifest.graph.compute_dtype
    if device == "cuda" and dtype != "float16":
        raise RuntimeUnavailableError(
            f"device 'cuda' needs a graph that computes in float16, this one computes in {dtype}. "
            "Export with --graph-weights fp16, int8 or int4, or use the CPU."
        )


def open_session(
    graph: CheckedGraph,
    artifact: Artifact,
    device: str,
    options: RuntimeOptions,
    kernels: OwnKernels | None = None,
) -> Any:
    """Open the artifact's graph on a device, and nowhere else.

    The library copies what it keeps: `graph` may go afterwards. Raises `RuntimeUnavailableError`
    if the device does not work, `ArtifactError` if the graph cannot be loaded on a CPU.
    """
    return _open(graph, artifact, device, options, {}, kernels)


def pack_graph(
    stored: Path,
    artifact: Artifact,
    options: RuntimeOptions,
    folder: Path,
    kernels: OwnKernels | None,
) -> None:
    """Write the graph with its weights as this processor wants them into `folder`.

    `stored` is a checked copy of the artifact's graph. The library maps the weights beside it:
    made of those in memory, this would take twice as much.
    """
    name = artifact.manifest.graph.file
    _open(
        stored,
        artifact,
        "cpu",
        options,
        {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": f"{name}.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        },
        kernels,
        saved=folder / name,
    )


def open_packed(
    graph: Path, artifact: Artifact, options: RuntimeOptions, kernels: OwnKernels | None
) -> Any:
    """Open a graph that `pack_graph` wrote; raises `EdgeMemLLMError`."""
    try:
        return _open(graph, artifact, "cpu", options, {}, kernels)
    except ArtifactError as error:
        raise EdgeMemLLMError(
            f"{graph.parent}: the packed weights cannot be used: {error.__cause__}. Delete this "
            "folder, or leave packed_cache out."
        ) from error


def _open(
    graph: CheckedGraph | Path,
    artifact: Artifact,
    device: str,
    options: RuntimeOptions,
    entries: dict[str, str],
    kernels: OwnKernels | None,
    saved: Path | None = None,
) -> Any:
    library = import_library()
    if device != "cpu":  # the process-wide logger tells of missing libraries, as the error does
        library.set_default_logger_severity(_FATAL_ONLY)
    settings = library.SessionOptions()
    settings.log_severity_level = _FATAL_ONLY
    settings.intra_op_num_threads = options.threads or physical_cores()
    settings.inter_op_num_threads = 1
    if kernels is not None:
        settings.register_custom_ops_library(_spelt(kernels.library))
    if saved is not None:
        settings.optimized_model_filepath = _spelt(saved)
    for key, value in (_entries(artifact, device) | entries).items():
        settings.add_session_config_entry(key, value)
    provider = (_PROVIDERS[device], _provider_options(device, options))
    where = graph if isinstance(graph, Path) else graph.where
    source = _spelt(graph) if isinstance(graph, Path) else graph.content
    if not isinstance(graph, Path) and graph.weights:
        values = map(library.OrtValue.ortvalue_from_numpy, graph.weights.values())
        settings.add_external_initializers(list(graph.weights), list(values))
    try:
        # Without this the library prints on failure and goes on with another device.
        session = library.InferenceSession(
            source, settings, providers=[provider], enable_fallback=False
        )
    except Exception as error:  # the library's exceptions share no base
        raise _refused(f"{where}: ONNX Runtime {library.__version__}", device, error) from error
    found = session.get_providers()[0]
    if found != provider[0]:
        raise _refused(str(where), device, f"it took {found} instead of {provider[0]}")
    # Kept for making the session again on another provider, which nobody does here.
    vars(session)["_model_bytes"] = None
    return session


def is_spelt(path: Path) -> bool:
    """Whether the library can open a path: it takes text that is UTF-8."""
    try:
        _spelt(path)
    except UnicodeDecodeError:
        return False
    return True


def _spelt(path: Path) -> str:
    # As it is on disk: what the locale makes of it may be no text.
    return os.fsencode(path).decode("utf-8")


def _entries(artifact: Artifact, device: str) -> dict[str, str]:
    if device == "cuda":
        # A node without a kernel there would otherwise run on the CPU, its values going to and
        # fro. Inputs that an operator itself reads on the CPU are no nodes and stay allowed.
        return {"session.disable_cpu_ep_fallback": "1"}
    if artifact.manifest.graph.weights not in QUANTISED_WEIGHTS:
        # Packed copies of float weights are no faster and double the memory; quantised ones
        # would fall to a path a hundred times slower without theirs.
        return {"session.disable_prepacking": "1"}
    return {}


def _provider_options(device: str, options: RuntimeOptions) -> dict[str, str]:
    if device == "cpu":
        return {}
    # Grow by what is needed, not to the next power of two: the device is rarely ours alone.
    chosen = {"arena_extend_strategy": "kSameAsRequested"}
    if options.arena_bytes is not None:
        chosen["gpu_mem_limit"] = str(options.arena_bytes)
    if options.cuda_graph:
        chosen["enable_cuda_graph"] = "1"
    return chosen


def _refused(where: str, device: str, reason: object) -> EdgeMemLLMError:
    """Return the error for a session that could not be made on this device."""
    if device == "cpu":
        return ArtifactError(
            f"{where} cannot load this graph: {reason}. "
            "Copy the artifact again, or export it again with this version."
        )
    if any(words in str(reason) for words in _ON_CPU):
        return RuntimeUnavailableError(
            f"{where} has no '{device}' form of some nodes of this graph and would compute them "
            f"on the CPU: {reason}. Use the CPU for all, or another version of onnxruntime-gpu."
        )
    return RuntimeUnavailableError(
        f"{where} cannot use the device '{device}': {reason}. Check the driver and its libraries "
        "(nvidia-smi; pip install 'onnxruntime-gpu[cuda,cudnn]' brings CUDA and cuDNN), or use "
        "the CPU."
    )
