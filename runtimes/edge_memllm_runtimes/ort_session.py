"""Sessions of ONNX Runtime: the library, its devices, its options, and its errors in our words.

Repacking weights for a processor takes longer than reading them, so packed weights may be kept in a
folder between loads: made on first use, whole or not at all, and checked each time. Knows no graph
inputs and no generation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from edge_memllm.artifact.atomic import clear_leftovers, reason, whole_folder
from edge_memllm.artifact.folder import Directory
from edge_memllm.artifact.strict_json import MAX_JSON_BYTES, exact_fields, parse_json_object
from edge_memllm.errors import (
    ArtifactError,
    CorruptionError,
    EdgeMemLLMError,
    RequestError,
    RuntimeUnavailableError,
)
from edge_memllm_runtimes.options import RuntimeOptions, physical_cores
from edge_memllm_runtimes.ort_graph import check_graph_file
from edge_memllm_runtimes.ort_library import import_library

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact
    from edge_memllm_runtimes.ort_graph import CheckedGraph


_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Every error comes back as an exception; the library need not write it to stderr as well.
_FATAL_ONLY = 4
QUANTIZED_WEIGHTS = ("int2", "int4", "int8", "mixed")
# The library's words when a node found no kernel on the device.
_ON_CPU = ("fallback to CPU EP", "nodes have not been")

_RECORD = "packed.json"
_LAYOUT = "1"  # of this cache: what is saved, and how it is recorded
_SPACE_FACTOR = 2.5  # originals and repacked copies, in sizes of the graph; 2.33 measured
_ALIGNMENT = 64  # what the library's allocator gives, and its packing relies on
_CPU_INFO = Path("/proc/cpuinfo")
_CHUNK_BYTES = 1 << 22

_log = logging.getLogger(__name__)


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
    graph: CheckedGraph, artifact: Artifact, device: str, options: RuntimeOptions
) -> Any:
    """Open the artifact's graph on a device, and nowhere else.

    The library copies what it keeps: `graph` may go afterwards. Raises `RuntimeUnavailableError`
    if the device does not work, `ArtifactError` if the graph cannot be loaded on a CPU.
    """
    return _open(graph, artifact, device, options, {})


def pack_graph(
    graph: CheckedGraph, artifact: Artifact, options: RuntimeOptions, folder: Path
) -> None:
    """Write the graph with its weights as this processor wants them into `folder`."""
    name = artifact.manifest.graph.file
    _open(
        graph,
        artifact,
        "cpu",
        options,
        {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": f"{name}.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        },
        saved=folder / name,
    )


def open_packed(graph: Path, artifact: Artifact, options: RuntimeOptions) -> Any:
    """Open a graph that `pack_graph` wrote; raises `EdgeMemLLMError`."""
    try:
        return _open(graph, artifact, "cpu", options, {})
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
    saved: Path | None = None,
) -> Any:
    library = import_library()
    if device != "cpu":  # the process-wide logger tells of missing libraries, as the error does
        library.set_default_logger_severity(_FATAL_ONLY)
    settings = library.SessionOptions()
    settings.log_severity_level = _FATAL_ONLY
    settings.intra_op_num_threads = options.threads or physical_cores()
    settings.inter_op_num_threads = 1
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
    if artifact.manifest.graph.weights not in QUANTIZED_WEIGHTS:
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


def packed_graph(
    folder: Path, artifact: Artifact, library_version: str, pack: Callable[[Path], None]
) -> Path:
    """Return the path of the artifact's graph with its weights repacked, checked.

    It is made on first use: `pack` writes the graph and its weights into the folder it is given.
    One that is damaged is made again, with a warning. Raises `RequestError` for weights that are
    not repacked or cannot be kept and for a folder inside the artifact, `EdgeMemLLMError` when it
    cannot be written.
    """
    _check_request(folder, artifact)
    facts = _facts(artifact, library_version)
    place = folder / _name(facts)
    try:
        if place.exists():
            return _checked(place, artifact, facts)
    except ArtifactError as error:
        _log.warning("packed weights are made again: %s", error)
        shutil.rmtree(place, ignore_errors=True)
    _make(folder, place, artifact, facts, pack)
    try:
        return _checked(place, artifact, facts)
    except RequestError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    except ArtifactError as error:  # nothing is damaged yet: the library writes another form
        shutil.rmtree(place, ignore_errors=True)
        raise RequestError(
            f"packed_cache cannot hold this graph: onnxruntime {library_version} wrote it in a "
            f"form that is not known here ({error}) Leave it out."
        ) from error


def processor_kind(cpu_info: Path = _CPU_INFO) -> str:
    """Return a digest of what decides the packed order: the processor's instruction sets."""
    features = [platform.machine(), platform.processor()]
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "CPU part")
    features += sorted({line for line in lines if line.startswith(wanted)})
    return hashlib.sha256("\n".join(features).encode()).hexdigest()


def _check_request(folder: Path, artifact: Artifact) -> None:
    weights = artifact.manifest.graph.weights
    if weights not in QUANTIZED_WEIGHTS:
        raise RequestError(
            f"packed_cache is for graphs with {', '.join(QUANTIZED_WEIGHTS)} weights; this "
            f"one's are {weights}, which are used as they are stored. Leave it out."
        )
    if not is_spelt(folder):
        raise RequestError(
            f"packed_cache is {str(folder)!a}: ONNX Runtime opens only paths that are UTF-8. Give "
            "another folder, or leave packed_cache out."
        )
    if artifact.path.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise RequestError(
            f"packed_cache is {folder}, inside the artifact, whose files are not to change. "
            "Give a folder elsewhere."
        )


def _facts(artifact: Artifact, library_version: str) -> dict[str, str]:
    """Everything the packed weights depend on."""
    graph, files = artifact.manifest.graph, artifact.manifest.files
    data = graph.external_data
    return {
        "graph": files[graph.file].sha256,
        "external_data": "" if data is None else files[data].sha256,
        "onnxruntime": library_version,
        "processor": processor_kind(),
        "layout": _LAYOUT,
    }


def _name(facts: dict[str, str]) -> str:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{facts['graph'][:12]}-{key[:20]}"


def _checked(place: Path, artifact: Artifact, facts: dict[str, str]) -> Path:
    """Return the graph's path; raises `ArtifactError` for anything that is not as it was made."""
    graph = artifact.manifest.graph.file
    directory = Directory(place)
    try:
        where = str(place / _RECORD)
        with os.fdopen(directory.open_file(_RECORD), "rb") as file:
            content = parse_json_object(file.read(MAX_JSON_BYTES + 1), where)
        record = exact_fields(content, where, ("facts", "files"))
        if record.mapping("facts") != facts:
            raise ArtifactError(f"{where}: made for another graph, library or processor.")
        files = record.mapping("files")
        for name in {graph, *files}:
            _check_file(directory, name, files.get(name))
        with os.fdopen(directory.open_file(graph), "rb") as file:
            data = file.read()
        identity = artifact.manifest.model.identity
        found = check_graph_file(data, place / graph, f"{graph}.data", identity)
    finally:
        directory.close()
    _check_alignment(found.packed_offsets)
    return place / graph


def _check_alignment(offsets: Collection[int]) -> None:
    """Raise `RequestError` for weights that the library would read from the wrong place.

    It repacks into memory that is aligned and finds the parts again by aligning the address.
    Version 1.31 aligns what it saves only from a megabyte on: what is smaller comes back as other
    numbers. Version 1.32 aligns everything.
    """
    if not offsets or any(offset % _ALIGNMENT for offset in offsets):
        raise RequestError(
            "packed_cache cannot hold this graph: the installed onnxruntime saves repacked "
            "matrices where it does not find them again, as 1.31 does with those below 1 MB. "
            "Install onnxruntime 1.32, or leave packed_cache out."
        )


def _check_file(directory: Directory, name: str, recorded: object) -> None:
    found = _digest(directory.open_file(name))
    if found != recorded:
        raise CorruptionError(f"{directory.path / name}: its content is not what was written.")


def _make(
    folder: Path,
    place: Path,
    artifact: Artifact,
    facts: dict[str, str],
    pack: Callable[[Path], None],
) -> None:
    """Write into a folder beside `place` and rename it, so that `place` is there whole or not."""
    start = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)  # before the space that they take is looked at
        _require_space(folder, artifact)
        with whole_folder(place) as partial:
            pack(partial)
            _write_record(partial, facts)
    except OSError as error:
        if place.exists():
            _log.info("packed weights were made by another process meanwhile: %s", place)
            return
        raise EdgeMemLLMError(
            f"{folder}: the packed weights cannot be written ({reason(error)}). Check the folder, "
            "or leave packed_cache out."
        ) from error
    _log.info("packed weights made in %.1f s: %s", time.perf_counter() - start, place)


def _write_record(partial: Path, facts: dict[str, str]) -> None:
    """Record what was written. Digests are against damage: who can write here can write both."""
    files = {
        file.name: _digest(os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
        for file in sorted(partial.iterdir())
    }
    text = json.dumps({"facts": facts, "files": files}, sort_keys=True, indent=2)
    (partial / _RECORD).write_text(text + "\n", encoding="ascii")


def _require_space(folder: Path, artifact: Artifact) -> None:
    graph, files = artifact.manifest.graph, artifact.manifest.files
    names = [name for name in (graph.file, graph.external_data) if name is not None]
    needed = round(_SPACE_FACTOR * sum(files[name].bytes for name in names))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeMemLLMError(
            f"{folder}: the packed weights need {needed:,} bytes, {free:,} are free. Free some "
            "space, choose another folder, or leave packed_cache out."
        )


def _digest(file: int) -> str:
    """Return size and digest of an open file, and close it."""
    digest, size = xxhash.xxh3_128(), 0
    with os.fdopen(file, "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return f"{size}:{digest.hexdigest()}"
