"""How many processor cores this process may really use."""

from __future__ import annotations

import os
from pathlib import Path

from edge_memllm.control_groups import processor_share

_TOPOLOGY = Path("/sys/devices/system/cpu")
_ROOT = Path("/")


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
