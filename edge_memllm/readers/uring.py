"""uring: batches through io_uring, past the page cache; the fastest where the kernel allows it.

A queue of reads that is never let run dry: as one completes, the next takes its place. Linux on
x86-64 only.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import threading
from collections.abc import Sequence

from edge_memllm.errors import RequestError, StorageError
from edge_memllm.readers.arena import Arena, Span
from edge_memllm.readers.direct import DirectReader
from edge_memllm.readers.reader import ASKED_FOR, Region, scatter
from edge_memllm.readers.ring import Ring

_DEPTH = 64


class UringReader:
    """One ring behind a lock for batches; single records are read directly, which is quicker.

    Raises `RequestError` where the system or its kernel has no io_uring for us.
    """

    name = "uring"

    def __init__(self, file: int, where: str, region: Region) -> None:
        self.reason = ASKED_FOR
        self._where = where
        self._direct = DirectReader(file, where, region)
        try:
            self._ring = _open_ring(where)
        except BaseException:
            self._direct.close()
            raise
        self._arena = Arena(_DEPTH, region, self._direct.alignment)
        self._lock = threading.Lock()
        self._closed = False
        self._process = os.getpid()

    def read(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        """Fill each target from its offset; see `Reader.read`."""
        if len(offsets) <= 1 or os.getpid() != self._process:  # the ring is the parent's
            return self._direct.read(offsets, targets)
        with self._lock:
            if self._closed:
                raise StorageError(f"{self._where}: the reader is closed.")
            try:
                self._ring.drain()  # what an interrupted batch left behind
                return self._read_rolling(offsets, targets)
            except OSError as error:
                raise StorageError(
                    f"{self._where}: io_uring failed ({error.strerror}). Use the reader 'direct'."
                ) from error

    def announce(self, offsets: Sequence[int], size: int) -> None:
        """Do nothing: there is no cache to read into."""

    def close(self) -> None:
        """Wait for what is being read, close the ring and the file."""
        if os.getpid() != self._process:  # what is being read is the parent's
            self._direct.close()
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._ring.drain()
                self._ring.close()
                self._direct.close()

    def _read_rolling(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        ring, count = self._ring, len(offsets)
        started = min(_DEPTH, count)
        record_in = list(range(started))  # which record each slot is being filled with
        for slot in record_in:
            self._queue(slot, offsets[slot], targets[slot])
        calls = finished = 0
        while finished < count:
            ring.submit()
            for slot, result in ring.completions():
                record = record_in[slot]
                calls += self._take(slot, result, offsets[record], targets[record])
                finished += 1
                if started < count:
                    record_in[slot] = started
                    self._queue(slot, offsets[started], targets[started])
                    started += 1
        return calls

    def _queue(self, slot: int, offset: int, parts: list[memoryview]) -> None:
        span = Span.around(offset, sum(map(len, parts)), self._direct.alignment)
        address, file = self._arena.addresses[slot], self._direct.file.descriptor
        self._ring.queue_read(file, span.begin, address, span.length, slot)

    def _take(self, slot: int, result: int, offset: int, parts: list[memoryview]) -> int:
        """Copy what was read; return the number of reads it took."""
        span = Span.around(offset, sum(map(len, parts)), self._direct.alignment)
        if result < span.needed:
            # Short, interrupted or failed: read again in the plain way, which goes on after a
            # short read and knows what to say of an error that stays.
            return 1 + self._direct.read([offset], [parts])
        scatter(self._arena.slots[slot], span.skip, parts)
        return 1


def _open_ring(where: str) -> Ring:
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 1 << 32:
        raise RequestError(
            f"The reader 'uring' needs Linux on x86-64, this is {platform.system()} on "
            f"{platform.machine()}. Use the reader 'direct' or 'pread'."
        )
    try:
        return Ring(_DEPTH)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        raise RequestError(
            f"{where}: this kernel refuses io_uring ({name}: {error.strerror}); containers often "
            "forbid it. Use the reader 'direct' or 'pread'."
        ) from error
