"""Weights as this processor wants them, kept in a folder between loads.

Low-bit matrices are repacked for a processor, and the copy is memory of the process; mapped from
here it is not. Made on first use, whole or not at all, and checked each time.
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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from edge_memllm.artifact.atomic import clear_leftovers, reason, whole_folder
from edge_memllm.artifact.folder import Directory
from edge_memllm.artifact.manifest import QUANTISED_WEIGHTS
from edge_memllm.artifact.strict_json import MAX_JSON_BYTES, exact_fields, parse_json_object
from edge_memllm.errors import ArtifactError, CorruptionError, EdgeMemLLMError, RequestError
from edge_memllm.process.limits import available_memory
from edge_memllm.progress import PACKING, Progress
from edge_memllm_runtimes.cpu_graph import FLOATS_FILE, floats_of, for_cpu
from edge_memllm_runtimes.graph_file import read_graph
from edge_memllm_runtimes.ort_graph import check_artifact_graph, check_graph_file
from edge_memllm_runtimes.ort_session import is_spelt

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact
    from edge_memllm_runtimes.own_kernels import OwnKernels

_RECORD = "packed.json"
_STORED = "stored"  # where the artifact's graph lies while it is repacked
_LAYOUT = "4"  # of this cache: what is saved, and how it is recorded
# Sizes of the graph: the copy, then originals and repacked copies (2.33 measured).
_SPACE_FACTOR = 3.5
_ALIGNMENT = 64  # what the library's allocator gives, and its packing relies on
_CPU_INFO = Path("/proc/cpuinfo")
_CHUNK_BYTES = 1 << 22
_UNUSED_SECONDS = 30 * 24 * 3600

_log = logging.getLogger(__name__)

# Writes what is repacked of the graph at the first path into the folder at the second.
Pack = Callable[[Path, Path], None]


def packed_graph(
    folder: Path,
    artifact: Artifact,
    library_version: str,
    pack: Pack,
    *,
    kernels: OwnKernels | None = None,
    unasked: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return the path of the artifact's graph with its weights repacked, checked.

    It is made on first use: `pack` writes graph and weights into the folder it is given. One that
    is damaged is made again, with a warning. What nobody has asked for leaves as much space as it
    takes, and makes room: what was not used for a month goes, and what another version of the
    library made of the same graph. ``progress`` is told of `PACKING` only when it is made.

    Raises `RequestError` for weights that are not repacked or cannot be kept and for a folder
    inside the artifact, `EdgeMemLLMError` when it cannot be written.
    """
    _check_request(folder, artifact)
    facts = _facts(artifact, library_version, kernels)
    bits = () if kernels is None else kernels.input_bits
    place = folder / _name(facts)
    try:
        if place.exists():
            return _checked(place, artifact, facts)
    except ArtifactError as error:
        _log.warning("packed weights are made again: %s", error)
        shutil.rmtree(place, ignore_errors=True)
    if unasked:
        _clear_unused(folder, facts)
    tell = progress or (lambda *_: None)
    tell(PACKING, 0, 1)
    sizes = _SPACE_FACTOR * (2 if unasked else 1)
    _make(folder, place, artifact, facts, bits, pack, sizes)
    tell(PACKING, 1, 1)
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


def forget_originals(graph: Path) -> None:
    """Let the page cache drop the weights that repacked copies are of, where memory is short.

    Loading reads both, half of the file each; what comes after reads the copies. Originals that
    stay cached take the place of those: in 2 GB the first prompt of a model of 1.4 took twice as
    long.
    """
    weights = graph.with_name(f"{graph.name}.data")
    memory = available_memory()
    if memory is None or not hasattr(os, "posix_fadvise") or memory > 2 * weights.stat().st_size:
        return
    found = read_graph(graph.read_bytes(), rewritten=True)
    with weights.open("rb") as file:
        for name in found.repacked:
            place = found.tensors[name]
            os.posix_fadvise(file.fileno(), place.start, place.size, os.POSIX_FADV_DONTNEED)


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
    if weights not in QUANTISED_WEIGHTS:
        raise RequestError(
            f"packed_cache is for graphs with {', '.join(QUANTISED_WEIGHTS)} weights; this "
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


def _facts(artifact: Artifact, library_version: str, kernels: OwnKernels | None) -> dict[str, str]:
    """Everything the packed weights depend on."""
    graph, files = artifact.manifest.graph, artifact.manifest.files
    data = graph.external_data
    return {
        "graph": files[graph.file].sha256,
        "external_data": "" if data is None else files[data].sha256,
        "onnxruntime": library_version,
        "processor": processor_kind(),
        "kernels": "" if kernels is None else kernels.name,
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
        found = check_graph_file(data, place / graph, f"{graph}.data", identity, rewritten=True)
    finally:
        directory.close()
    if found.packed_offsets or not facts["kernels"]:  # our kernels read weights as they are stored
        _check_alignment(found.packed_offsets)
    with suppress(OSError):  # when it was used last; of no other use
        os.utime(place / _RECORD)
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
    input_bits: Collection[int],
    pack: Pack,
    sizes: float,
) -> None:
    """Write into a folder beside `place` and rename it, so that `place` is there whole or not."""
    start = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)  # before the space that they take is looked at
        _require_space(folder, artifact, sizes)
        with whole_folder(place) as partial:
            stored = partial / _STORED
            pack(_copied(artifact, stored, input_bits), partial)
            shutil.rmtree(stored)
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


def _copied(artifact: Artifact, folder: Path, input_bits: Collection[int]) -> Path:
    """Copy the graph as a CPU computes it, and its weights, checked; return the graph's path."""
    graph = artifact.manifest.graph
    content, checked = check_artifact_graph(artifact)
    found = for_cpu(content, input_bits=input_bits)
    folder.mkdir()
    (folder / graph.file).write_bytes(found.content)
    if graph.external_data is not None:
        copy = folder / graph.external_data
        artifact.copy_checked(graph.external_data, copy)
        with (folder / FLOATS_FILE).open("wb") as file:
            for weight in found.widened:
                place = checked.tensors[weight]
                halves = np.fromfile(copy, "<f2", place.size // 2, offset=place.start)
                file.write(floats_of(halves))
    return folder / graph.file


def _write_record(partial: Path, facts: dict[str, str]) -> None:
    """Record what was written. Digests are against damage: who can write here can write both."""
    files = {
        file.name: _digest(os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
        for file in sorted(partial.iterdir())
    }
    text = json.dumps({"facts": facts, "files": files}, sort_keys=True, indent=2)
    (partial / _RECORD).write_text(text + "\n", encoding="ascii")


def _require_space(folder: Path, artifact: Artifact, sizes: float) -> None:
    graph, files = artifact.manifest.graph, artifact.manifest.files
    names = [name for name in (graph.file, graph.external_data) if name is not None]
    needed = round(sizes * sum(files[name].bytes for name in names))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeMemLLMError(
            f"{folder}: the packed weights need {needed:,} bytes, {free:,} are free. Free some "
            "space, choose another folder, or leave packed_cache out."
        )


def _clear_unused(folder: Path, facts: dict[str, str]) -> None:
    """Remove what is used no more. Never fails: it is not what was asked."""
    oldest = time.time() - _UNUSED_SECONDS
    with suppress(OSError):
        for place in folder.iterdir():
            known = _recorded(place)
            if known is None:
                continue
            newer = {name: facts[name] for name in ("onnxruntime", "kernels")}
            replaced = known | newer == facts
            if replaced or (place / _RECORD).stat().st_mtime < oldest:
                shutil.rmtree(place, ignore_errors=True)  # who has it mapped keeps it


def _recorded(place: Path) -> dict[str, str] | None:
    """What an entry was made for; None for what is none of ours."""
    try:
        known = json.loads((place / _RECORD).read_bytes())["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if isinstance(known, dict) else None


def _digest(file: int) -> str:
    """Return size and digest of an open file, and close it."""
    digest, size = xxhash.xxh3_128(), 0
    with os.fdopen(file, "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return f"{size}:{digest.hexdigest()}"
