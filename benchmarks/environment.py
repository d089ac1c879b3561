"""Where something was measured, without names or paths. Linux tells the processor, others not."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

_CPU = Path("/proc/cpuinfo")


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Processor, cores, system, and the versions of those packages that are installed."""
    versions = ((name, _version(name)) for name in packages)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{name: version for name, version in versions if version is not None},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    lines = _CPU.read_text("utf-8").splitlines() if _CPU.exists() else []
    names = (each.split(":", 1)[1].strip() for each in lines if each.startswith("model name"))
    return next(names, "?")
