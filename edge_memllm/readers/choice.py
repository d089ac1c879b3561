"""auto: which reader suits this table on this machine.

`pread` is the answer as long as the page cache can hold the table. When it cannot, a few random
records are read with and without the page cache. Text repeats itself so much that even a page cache
of a few hundredths of the table has half of what is asked for (docs/performance.md), so going past
it must be more than twice as fast to pay, unless a record cache of our own has the repetitions.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from contextlib import suppress
from statistics import median
from time import perf_counter

from edge_memllm.errors import RequestError
from edge_memllm.process.limits import available_memory
from edge_memllm.readers.direct import DirectReader
from edge_memllm.readers.pread import PreadReader
from edge_memllm.readers.reader import Reader, Region
from edge_memllm.readers.uring import UringReader

_log = logging.getLogger(__name__)

_SMALL_BYTES = 64_000_000  # read once, any system keeps that in memory: nothing to find out
_PROBES = 8  # records per reader, fewer when storage is slow
_PROBE_SECONDS = 0.025
_SLOW_SECONDS = 0.005
_MISSES = 0.5  # of the reads of ordinary text, at most, when little of the table is in memory


def choose_reader(file: int, where: str, region: Region, *, cached: bool) -> Reader:
    """Return a reader whose `reason` says why it was taken; it takes over the file.

    `cached` says that a record cache stands in front of it. Raises `StorageError`.
    """
    plain = PreadReader(file, where)
    if region.size <= _SMALL_BYTES:
        plain.reason = f"the table is small ({_size(region.size)}), the page cache will hold it"
        return plain
    readers: list[Reader] = [plain]
    try:
        memory = available_memory()
        if memory is not None and memory < region.size:
            readers += _past_the_page_cache(file, where, region)
        times = _probe(readers, region)
        chosen = _faster(readers, times, 1.0 if cached else _MISSES)
        chosen.reason = _reason(region, memory, readers, times)
    except BaseException:
        _close(readers)
        raise
    _close([reader for reader in readers if reader is not chosen])
    _warn_if_slow(where, region, times[readers.index(chosen)])
    return chosen


def _past_the_page_cache(file: int, where: str, region: Region) -> list[Reader]:
    """Return the best such reader that works here, if any."""
    for kind in (UringReader, DirectReader):
        # Opened anew, since the flag for it belongs to all duplicates of a descriptor.
        with suppress(OSError, RequestError):
            again = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
            return [kind(again, where, region)]
    return []


def _probe(readers: Sequence[Reader], region: Region) -> list[float]:
    """Return the median seconds that each reader takes for a random record."""
    target = [memoryview(bytearray(region.record_bytes))]
    seconds: list[list[float]] = [[] for _ in readers]
    # Never the same records at each start: the page cache would have them.
    records = iter(random.sample(range(region.count), min(region.count, _PROBES * len(readers))))
    begin = perf_counter()
    for _ in range(_PROBES):
        for reader, times, record in zip(readers, seconds, records, strict=False):
            start = perf_counter()
            reader.read([region.start + record * region.stride], [target])
            times.append(perf_counter() - start)
        if perf_counter() - begin > _PROBE_SECONDS:
            break
    return [median(times) for times in seconds]


def _faster(readers: Sequence[Reader], times: Sequence[float], misses: float) -> Reader:
    """Return the reader that costs less for a token of ordinary text; the first is pread."""
    if len(readers) == 2 and times[1] < misses * times[0]:
        return readers[1]
    return readers[0]


def _reason(
    region: Region, memory: int | None, readers: Sequence[Reader], times: Sequence[float]
) -> str:
    took = " and ".join(
        f"{seconds * 1e3:.2f} ms with {reader.name}"
        for reader, seconds in zip(readers, times, strict=True)
    )
    match memory:
        case None:
            found = "this system does not tell how much memory is available"
        case _ if memory < region.size:
            found = f"its {_size(region.size)} exceed the {_size(memory)} of memory available"
        case _:
            found = f"its {_size(region.size)} fit into the {_size(memory)} of memory available"
    return f"{found}; a random record took {took}"


def _warn_if_slow(where: str, region: Region, seconds: float) -> None:
    if seconds > _SLOW_SECONDS:
        _log.warning(
            "%s: a record takes %.0f ms to read, so each token that is not in memory waits that "
            "long: at most %.0f tokens per second. Move the artifact to faster storage, or use "
            "the reader 'ram' if %s of memory can be spared.",
            where,
            seconds * 1e3,
            1 / seconds,
            _size(region.size),
        )


def _close(readers: Sequence[Reader]) -> None:
    for reader in readers:
        reader.close()


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
