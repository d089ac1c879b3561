"""uring: batches through io_uring, past the page cache; the fastest where the kernel allows it.

A queue of reads that is never let run dry: as one completes, the next takes its place. Linux on
x86-64 only.

The binding is small: one ring, read without copies. On x86-64 plain stores and loads are ordered as
the shared queues need them, which Python could not ask for elsewhere.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import finalize

from edge_memllm.artifact.open_files import close_file
from edge_memllm.errors import RequestError, StorageError
from edge_memllm.readers.direct import DirectReader
from edge_memllm.readers.reader import ASKED_FOR, Arena, Region, Span, scatter

_SETUP, _ENTER = 425, 426  # numbers of the system calls
_GETEVENTS = 1
_READ = 22  # the operation: read into one buffer at an offset
_SQES_AT = 0x10000000  # where the descriptor maps the entries; the queues are at 0
_SINGLE_MMAP, _CURRENT_POSITION = 1 << 0, 1 << 3  # features: one map for both queues; Linux 5.6
_PARAMETERS = struct.Struct("=5I 2I 3I 10I 10I")  # struct io_uring_params, its offsets last
_ENTRY_BYTES = 64
# opcode, flags, ioprio, descriptor, offset, address, length, rw_flags, user_data; the rest is 0
_ENTRY = struct.Struct("=BBHiQQIIQ")
_COMPLETION = struct.Struct("=QiI")  # user_data, result, flags
_WAIT_MILLISECONDS = 2000  # for the kernel to find resources, before giving up

_DEPTH = 64


class Ring:
    """Up to `depth` reads at once. Raises `OSError` where the kernel has no io_uring for us."""

    def __init__(self, depth: int) -> None:
        self._call = _system_call()
        parameters = ctypes.create_string_buffer(_PARAMETERS.size)
        self._descriptor = self._call(_SETUP, depth, parameters, 0, 0, 0, 0)
        self._free = finalize(self, close_file, self._descriptor)  # also if nobody calls `close`
        try:
            self._map(_PARAMETERS.unpack(parameters.raw))
        except BaseException:
            self._free()
            raise
        self.depth = depth
        self.in_flight = 0

    def _map(self, values: tuple[int, ...]) -> None:
        entries, completions, features = values[0], values[1], values[5]
        if not features & _SINGLE_MMAP or not features & _CURRENT_POSITION:
            raise OSError(errno.ENOSYS, "its io_uring is older than Linux 5.6")
        # head, tail, ring_mask, ring_entries, flags, dropped, array, ... / head, tail, mask, ...
        submission, completion = values[10:20], values[20:30]
        array_at, completions_at = submission[6], completion[5]
        size = max(array_at + 4 * entries, completions_at + _COMPLETION.size * completions)
        self._queues = mmap.mmap(self._descriptor, size)
        self._entries = mmap.mmap(self._descriptor, entries * _ENTRY_BYTES, offset=_SQES_AT)
        self._words = memoryview(self._queues).cast("I")
        self._sq_head, self._sq_tail = submission[0] // 4, submission[1] // 4
        self._cq_head, self._cq_tail = completion[0] // 4, completion[1] // 4
        self._mask, self._cq_mask = entries - 1, completions - 1
        self._completions_at = completions_at
        for index in range(entries):
            self._words[array_at // 4 + index] = index

    def queue_read(self, file: int, offset: int, address: int, length: int, tag: int) -> None:
        """Queue one read; `submit` hands it to the kernel. At most `depth` may be in flight."""
        tail = self._words[self._sq_tail]
        at = (tail & self._mask) * _ENTRY_BYTES
        _ENTRY.pack_into(self._entries, at, _READ, 0, 0, file, offset, address, length, 0, tag)
        self._words[self._sq_tail] = tail + 1 & 0xFFFFFFFF
        self.in_flight += 1

    def submit(self) -> None:
        """Hand over what is queued, and wait until something in flight is complete."""
        for _ in range(_WAIT_MILLISECONDS):
            queued = self._words[self._sq_tail] - self._words[self._sq_head] & 0xFFFFFFFF
            try:
                self._call(_ENTER, self._descriptor, queued, 1, _GETEVENTS, 0, 0)
            except InterruptedError:
                continue  # Python has run its signal handlers
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EBUSY):
                    raise
                if self._words[self._cq_head] == self._words[self._cq_tail]:
                    time.sleep(0.001)  # the kernel is out of resources for now
                    continue
            return
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def completions(self) -> Iterator[tuple[int, int]]:
        """Yield (tag, bytes read or negative errno) of what is complete."""
        words = self._words
        while (head := words[self._cq_head]) != words[self._cq_tail]:
            at = self._completions_at + (head & self._cq_mask) * _COMPLETION.size
            tag, result, _ = _COMPLETION.unpack_from(self._queues, at)
            words[self._cq_head] = head + 1 & 0xFFFFFFFF
            self.in_flight -= 1
            yield tag, result

    def drain(self) -> None:
        """Wait for all that is in flight and forget it."""
        while self.in_flight:
            self.submit()
            for _ in self.completions():
                pass

    def close(self) -> None:
        """Unmap the queues and close the ring."""
        self._words.release()
        self._entries.close()
        self._queues.close()
        self._free()


def _system_call() -> Any:
    """Return the C library's `syscall`, raising `OSError` when it fails."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    call.argtypes = [ctypes.c_long] * 2 + [ctypes.c_void_p] + [ctypes.c_long] * 4
    call.errcheck = _check
    return call


def _check(result: Any, *_: object) -> Any:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


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
