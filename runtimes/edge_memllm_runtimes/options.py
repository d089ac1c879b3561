"""What may be asked of a runtime besides its device: one object instead of many arguments.

Plain data with its checks; knows no library that computes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edge_memllm.errors import RequestError
from edge_memllm.process.limits import processor_share
from edge_memllm.process.memory_account import MemoryShare
from edge_memllm.progress import Progress

_TOPOLOGY = Path("/sys/devices/system/cpu")
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How a graph is to be computed. None stands for the runtime's own choice."""

    threads: int | None = None  # of a CPU; None takes one per physical core
    kv_bytes: int | None = None  # keys and values of all generations together
    score_bytes: int = 0  # part of `kv_bytes` that a position takes of attention, once per batch
    memory_share: MemoryShare | None = None  # in place of both: what several models share
    packed_cache: Path | None = None  # CPU only: where repacked weights are kept between loads
    packed_unasked: bool = False  # nobody chose that folder: it must leave space, and stay small
    own_files: bool = False  # nobody else can change the artifact: its weights can be mapped
    own_kernels: bool = True  # CPU only: compute with kernels of our own where there are some
    own_dtype: bool = False  # compute in the graph's own, as a judge of all devices has to
    arena_bytes: int | None = None  # CUDA only: weights and what steps work on
    cuda_graph: bool = False  # CUDA only: record a decode step once, then replay it
    progress: Progress | None = None  # told of `PACKING`, where weights are repacked to be kept

    def check_device(self, device: str) -> None:
        """Raise `RequestError` for an option that `device`, "cpu" or "cuda", does not have."""
        if device == "cpu" and (self.cuda_graph or self.arena_bytes is not None):
            name = "cuda_graph" if self.cuda_graph else "vram_limit"
            raise RequestError(
                f"{name} is for CUDA, the device is 'cpu'. Leave it out or use device 'cuda'."
            )
        if device == "cuda" and self.packed_cache is not None:
            raise RequestError(
                "packed_cache is for a CPU, the device is 'cuda', which does not repack weights "
                "in memory. Leave it out or use device 'cpu'."
            )


def physical_cores(topology: Path = _TOPOLOGY, root: Path = _ROOT) -> int:
    """Return the physical cores among the processors this process is allowed on.

    Two hardware threads of one core count once: they share the arithmetic that a graph needs.
    Where the system does not tell, every processor counts as a core. A container may be given less
    of their time than that (docker --cpus, limits of Kubernetes): then it is as many cores as that
    time is of, rounded up, for threads beyond it would only wait for each other.
    """
    cores = _cores(topology)
    return max(1, min(cores, processor_share(root) or cores))


def _cores(topology: Path) -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_siblings(topology, processor) for processor in os.sched_getaffinity(0)})


def _siblings(topology: Path, processor: int) -> str:
    file = topology / f"cpu{processor}" / "topology" / "thread_siblings_list"
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return str(processor)
