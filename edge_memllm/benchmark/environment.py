"""Where figures were measured: processor, system and versions, without names or paths."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edge_memllm import __version__
from edge_memllm.benchmark.bandwidth import memory_bytes

_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "xxhash")


def environment() -> dict[str, Any]:
    """Return what a reader of the figures must know of this machine."""
    from edge_memllm_runtimes.processors import physical_cores

    return {
        "processor": _processor(),
        "logical_cores": os.cpu_count(),
        "physical_cores": physical_cores(),
        "memory_bytes": memory_bytes(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "edge_memllm": __version__,
        **{name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
