"""How many processor cores this process may really use."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_cores(topology: Path = _TOPOLOGY) -> int:
    """Return the physical cores among the processors this process is allowed on.

    Two hardware threads of one core count once: they share the arithmetic that a graph needs.
    Where the system does not tell, every processor counts as a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {_siblings(topology, processor) for processor in allowed}
    return max(1, len(cores))


def _siblings(topology: Path, processor: int) -> str:
    file = topology / f"cpu{processor}" / "topology" / "thread_siblings_list"
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return str(processor)
