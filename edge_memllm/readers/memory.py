"""How much memory this process may still use, as far as Linux tells.

Reads the system's own files and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def available_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes the system calls available, or the limit of this process' control group.

    The smaller of both. None where the system does not tell.
    """
    known = [*_available(root), *_group_limits(root)]
    return min(known) if known else None


def _available(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_limits(root: Path) -> Iterator[int]:
    """The limits of the group and of those around it. Without a limit there is a huge one."""
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2
            yield from _limits(mount, group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits(mount / "memory", group, "memory.limit_in_bytes")


def _limits(mount: Path, group: str, name: str) -> Iterator[int]:
    # Inside a container the group's own folder may be missing, and the mount is the group.
    folder = mount / group.lstrip("/")
    for each in (folder, *folder.parents):
        if each.is_relative_to(mount):
            yield from (int(line) for line in _lines(each / name) if line.isdigit())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
