"""What storage a file lies on, as far as the system tells. No paths, no serial numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_DEVICES = Path("/sys/dev/block")
_MOUNTS = Path("/proc/self/mountinfo")


def describe_storage(
    path: Path, devices: Path = _DEVICES, mounts: Path = _MOUNTS
) -> dict[str, Any]:
    """Return model, driver, kind and file system; None for each that is not known."""
    number = os.stat(path).st_dev
    name = f"{os.major(number)}:{os.minor(number)}" if hasattr(os, "major") else ""
    disk = _disk(devices / name) if name else None
    return {
        "model": _text(disk, "device/model"),
        "driver": _driver(disk),
        "rotational": {"0": False, "1": True}.get(_text(disk, "queue/rotational") or ""),
        "logical_block_bytes": _number(_text(disk, "queue/logical_block_size")),
        "file_system": _file_system(name, mounts),
    }


def _disk(link: Path) -> Path | None:
    """The folder of the whole disk; a partition lies inside it."""
    if not link.exists():
        return None
    folder = link.resolve()
    return folder.parent if (folder / "partition").exists() else folder


def _text(disk: Path | None, name: str) -> str | None:
    if disk is None:
        return None
    try:
        return (disk / name).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _driver(disk: Path | None) -> str | None:
    link = None if disk is None else disk / "device" / "driver"
    return link.resolve().name if link is not None and link.exists() else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _file_system(device: str, mounts: Path) -> str | None:
    """The type stands behind a lone dash in the line of the mount."""
    try:
        lines = mounts.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, behind = line.partition(" - ")
        if before.split()[2:3] == [device]:
            return behind.split()[0]
    return None
