"""How much memory this process may still use, as far as Linux tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_memllm.control_groups import lines, memory_limits

_ROOT = Path("/")


def available_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes the system calls available, or the limit of this process' control group.

    The smaller of both. None where the system does not tell.
    """
    known = [*_available(root), *memory_limits(root)]
    return min(known) if known else None


def _available(root: Path) -> Iterator[int]:
    for line in lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
