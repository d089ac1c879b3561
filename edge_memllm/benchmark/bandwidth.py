"""How fast this machine's memory can be read: numpy reductions over a large array.

A reduction reads every byte once and writes nothing, as a decode step does with the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np

_LEAST_BYTES = 256 << 20
_CACHES = 4  # the array is this many times the largest cache,
_SHARE = 8  # and at most this part of the memory
_PASSES = 5
_LEVELS = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# The widest loads win on one processor and the narrow ones on another: the fastest is taken.
# No dot product: it would bring the threads of a BLAS library along.
_METHODS: dict[str, tuple[type[np.generic], Callable[[Any], Any]]] = {
    "numpy max of int32": (np.int32, np.max),
    "numpy max of uint64": (np.uint64, np.max),
    "numpy or of uint64": (np.uint64, np.bitwise_or.reduce),
}


@dataclass(frozen=True, slots=True)
class BandwidthSample:
    """Bytes per second of a few passes right after each other."""

    median: float
    best: float


class MemoryBandwidth:
    """Measures reading with a number of threads; a context manager, as it holds the array."""

    def __init__(self, array_bytes: int | None = None) -> None:
        """Make the array; None takes a size that no cache holds."""
        self.array_bytes = array_bytes or array_size()
        self._array = np.ones(self.array_bytes // 8, np.uint64)
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._methods: dict[int, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pool in self._pools.values():
            pool.shutdown()

    def method(self, threads: int) -> str:
        """Return the fastest way to read with this many threads, found when first asked for."""
        if threads not in self._methods:
            self._pools[threads] = ThreadPoolExecutor(threads)
            best = {name: min(self._passes(threads, name)) for name in _METHODS}
            self._methods[threads] = min(best, key=best.__getitem__)
        return self._methods[threads]

    def sample(self, threads: int) -> BandwidthSample:
        """Measure now: a few passes over the array, each thread reading its own part."""
        seconds = self._passes(threads, self.method(threads))
        return BandwidthSample(self.array_bytes / median(seconds), self.array_bytes / min(seconds))

    def _passes(self, threads: int, method: str) -> list[float]:
        kind, reduce = _METHODS[method]
        parts = np.array_split(self._array.view(kind), threads)
        return [_timed(self._pools[threads], reduce, parts) for _ in range(_PASSES)]


def _timed(pool: ThreadPoolExecutor, reduce: Callable[[Any], Any], parts: list[Any]) -> float:
    start = perf_counter()
    list(pool.map(reduce, parts))
    return perf_counter() - start


def array_size(levels: Path = _LEVELS) -> int:
    """Return 256 MiB, or more where the largest cache asks for it and memory allows it."""
    wanted = max(_LEAST_BYTES, _CACHES * _largest_cache(levels))
    memory = memory_bytes()
    return wanted if memory is None else min(wanted, memory // _SHARE)


def _largest_cache(levels: Path) -> int:
    sizes = []
    for file in levels.glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1] in _UNITS:
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes, default=0)


def memory_bytes() -> int | None:
    """Return the bytes of memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None
