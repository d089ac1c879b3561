"""A whole measurement: variants loaded side by side, trials and reads in rounds, one report.

The root that puts the parts of this package together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edge_memllm.artifact.folder import Artifact
from edge_memllm.benchmark.machine import (
    DeviceProbe,
    MemoryBandwidth,
    describe_storage,
    environment,
    weight_bytes,
)
from edge_memllm.benchmark.plan import Plan, Request, check_room
from edge_memllm.benchmark.report import Cell, bandwidths, cells_of, compared, identities, reading
from edge_memllm.benchmark.rounds import (
    StorageReads,
    Worker,
    read_rounds,
    start_workers,
    trial_rounds,
)
from edge_memllm.errors import RuntimeUnavailableError
from edge_memllm.progress import Progress


def measure(request: Request, progress: Progress) -> dict[str, Any]:
    """Measure everything and return the report as plain data.

    All variants are loaded at the same time, each in a process of its own, and memory must hold
    them all. Raises what loading and generating raise.
    """
    plan, where = request.plan, environment()  # before our own work shows in the load
    with ExitStack() as opened:
        artifacts = {
            path: opened.enter_context(Artifact.open(path))
            for path in dict.fromkeys(variant.artifact for variant in request.variants)
        }
        for artifact in artifacts.values():
            model = artifact.manifest.model
            check_room(plan, model.vocab_size, model.max_position_embeddings)
        crew = start_workers(request.variants, plan, opened)
        measured = _measured(crew, plan, artifacts, opened, progress)
    return _report(request, crew, measured) | {"environment": where}


@dataclass(frozen=True, slots=True)
class _Measured:
    """All that was measured, before anything is made of it."""

    cells: list[Cell]
    fingerprints: dict[str, str]
    memory: list[dict[str, Any]]  # by worker
    weights: dict[Path, int]
    reads: dict[Path, StorageReads | str]  # or why there are none
    storage: dict[Path, dict[str, Any]]
    bandwidth: dict[str, Any]


def _measured(
    crew: Sequence[Worker],
    plan: Plan,
    artifacts: dict[Path, Artifact],
    opened: ExitStack,
    progress: Progress,
) -> _Measured:
    fingerprints = {worker.variant.name: worker.ask("fingerprint") for worker in crew}
    memory = opened.enter_context(MemoryBandwidth())
    samples = trial_rounds(crew, plan, memory, progress)
    return _Measured(
        cells=cells_of(crew, plan, samples),
        fingerprints=fingerprints,
        memory=[worker.ask("memory") for worker in crew],  # before the reads' buffers
        weights={path: weight_bytes(artifact) for path, artifact in artifacts.items()},
        reads={
            path: _reads(crew, artifact, plan, progress) for path, artifact in artifacts.items()
        },
        storage={
            path: describe_storage(path / artifact.manifest.table.file)
            for path, artifact in artifacts.items()
        },
        bandwidth={
            "array_bytes": memory.array_bytes,
            "threads": bandwidths(crew, samples, memory.method),
        },
    )


def _reads(
    crew: Sequence[Worker], artifact: Artifact, plan: Plan, progress: Progress
) -> StorageReads | str:
    """The reads of one artifact's table by the workers that have it open; or why there are none."""
    own = {index: each for index, each in enumerate(crew) if each.variant.artifact == artifact.path}
    try:
        with DeviceProbe(artifact) as probe:
            return read_rounds(own, probe, plan, artifact.manifest.model.vocab_size, progress)
    except RuntimeUnavailableError as error:
        return str(error)


def _report(request: Request, crew: Sequence[Worker], found: _Measured) -> dict[str, Any]:
    plan, count = request.plan, len(crew)
    variants = [
        _figures(cell, place % count, plan, found) for place, cell in enumerate(found.cells)
    ]
    identity = identities(found.cells, found.fingerprints)
    return {
        **variants[0],
        "variants": variants,
        "comparisons": _comparisons(request, count, found.cells),
        "identical": all(group["identical"] for group in identity),
        "identity": identity,
        "repeats": plan.repeats,
        "seed": plan.seed,
        "prompts": "distinct tokens" if plan.text is None else "text",
        "memory_bandwidth": found.bandwidth,
        "storage": [
            describe | {"records": _device(found.reads[path])}
            for path, describe in found.storage.items()
        ],
    }


def _figures(cell: Cell, index: int, plan: Plan, found: _Measured) -> dict[str, Any]:
    path = cell.worker.variant.artifact
    figures = cell.figures(plan, found.weights[path], found.memory[index])
    reads = found.reads[path]
    prompt_bytes = cell.context * cell.worker.description["record_bytes"]
    return figures | {
        "reading": None if isinstance(reads, str) else reading(reads, index, prompt_bytes),
        "to_resident": _to_resident(cell, found.cells),
    }


def _to_resident(cell: Cell, cells: Sequence[Cell]) -> dict[str, Any] | None:
    """The speeds over those of the same settings with the table in memory, if these are there."""
    for other in cells:
        same = other.worker.variant.computation == cell.worker.variant.computation
        if same and other.context == cell.context and other.worker.variant.cache == "resident":
            return None if other is cell else compared(cell, other)
    return None


def _comparisons(request: Request, count: int, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    found = []
    for start in range(0, len(cells), count):
        for place, against in request.pairs:
            cell, other = cells[start + place], cells[start + against]
            names = {"name": cell.name, "against": other.name, "context": cell.context}
            found.append(names | compared(cell, other))
    return found


def _device(reads: StorageReads | str) -> dict[str, Any]:
    if isinstance(reads, str):
        return {"not_measured": reads}
    return {
        "single_seconds": median(reads.device.single_seconds),
        "bytes_per_second": median(reads.device.rates),
        "ways_bytes_per_second": {way: median(each) for way, each in reads.device_ways.items()},
    }
