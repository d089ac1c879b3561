"""What the control groups of this process allow it, as far as Linux tells (versions 1 and 2).

A container's limits are files in the folders of its groups; the strictest of a group and of those
around it holds. Reads the system's own files and nothing else.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_PERIOD = 100_000  # microseconds, where the system does not tell


def available_processors(root: Path = _ROOT) -> int:
    """Return how many processors this process may keep busy.

    Those it is allowed on, but no more than its share of their time, rounded up.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, processor_share(root) or allowed or 1)


def processor_share(root: Path = _ROOT) -> int | None:
    """Return the processors whose time the groups' quotas add up to, rounded up; None without."""
    shares = [share for folder in group_folders("cpu", root) for share in _shares(folder)]
    return max(1, math.ceil(min(shares))) if shares else None


def memory_limits(root: Path = _ROOT) -> Iterator[int]:
    """Yield the bytes that each group may take. Version 1 has a huge one where there is none."""
    for folder in group_folders("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            yield from (int(line) for line in lines(folder / name) if line.isdecimal())


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


def group_folders(controller: str, root: Path = _ROOT) -> Iterator[Path]:
    """Yield the folders of this process' groups that may bound what `controller` is of.

    Each is followed by those of the groups around it, as far as they can be seen.
    """
    mounts = _mounts(root)
    for line in lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2 has one tree for everything
            mount, top = mounts.get("", ("sys/fs/cgroup", "/"))
        elif controller in controllers.split(","):
            mount, top = mounts.get(controller, (f"sys/fs/cgroup/{controller}", "/"))
        else:
            continue
        base = root / mount
        folder = base / _below(group, top)
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(base))


def lines(path: Path) -> list[str]:
    """Return the lines of a file of the system's, none where it is not."""
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _shares(folder: Path) -> Iterator[float]:
    """Yield the processors that a group's quota is the time of, if it has one."""
    for line in lines(folder / "cpu.max"):
        yield from _share(*line.split()[:2])
    for quota in lines(folder / "cpu.cfs_quota_us"):
        yield from _share(quota, *lines(folder / "cpu.cfs_period_us"))


def _share(quota: str = "", period: str = "", *_: str) -> Iterator[float]:
    """Yield what microseconds of each period are; "max" and -1 are no quota."""
    length = int(period) if period.isdecimal() else _PERIOD
    if quota.isdecimal() and int(quota) and length:
        yield int(quota) / length


def _mounts(root: Path) -> dict[str, tuple[str, str]]:
    """Return where the tree of each controller is mounted, and which group is at its top.

    In a container that is often not the outermost. "" stands for the one tree of version 2.
    """
    found: dict[str, tuple[str, str]] = {}
    for line in lines(root / "proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        match mount.split(), source.split():
            case [_, _, _, top, place, *_], ["cgroup2", *_]:
                names = [""]
            case [_, _, _, top, place, *_], ["cgroup", _, options]:
                names = options.split(",")
            case _:
                continue
        for name in names:
            found.setdefault(name, (_unescaped(place).lstrip("/"), _unescaped(top)))
    return found


def _below(group: str, top: str) -> str:
    """Return the way from the top of a mounted tree to a group, "" where it cannot be seen."""
    if group != top and not group.startswith(top.rstrip("/") + "/"):
        top = "/"  # the group is told as the container sees it, the top as the system does
    way = group[len(top) :].lstrip("/")
    return "" if ".." in way.split("/") else way


def _unescaped(text: str) -> str:
    """Undo what mountinfo does to blanks: octal numbers for them."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
