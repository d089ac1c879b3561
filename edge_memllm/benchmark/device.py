"""How fast the storage device delivers records of a table that are not in memory.

Single records are read with O_DIRECT and nothing else: the device's own latency. For many at once
the fastest way wins, as no single one is best on every device.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from edge_memllm.benchmark.page_cache import evictor
from edge_memllm.errors import RequestError, RuntimeUnavailableError, StorageError
from edge_memllm.records import RecordBuffer
from edge_memllm.table import Table

if TYPE_CHECKING:
    from edge_memllm.artifact import Artifact

_THREADS = 16
_TRIES = 16
_PAGE = 4096  # devices that cannot address less want reads of whole pages
_READERS = ("direct", "uring", "pread")

Batch = Callable[[Sequence[int]], None]


class DeviceProbe:
    """Reads records of an artifact straight from its device; a context manager.

    Raises `RuntimeUnavailableError` where the system or the file system takes no direct reads.
    """

    def __init__(self, artifact: Artifact) -> None:
        table = artifact.manifest.table
        self._largest = table.record_bytes
        self._opened = ExitStack()
        try:
            self._file = self._open_direct(artifact, table.file)
            self._alignment = self._found_alignment(table.alignment, table.records_offset)
            self._locate = self._open_table(artifact, "pread").locate
            path = artifact.path / table.file
            self._evict = self._opened.enter_context(evictor(path))
            self._pool = self._opened.enter_context(ThreadPoolExecutor(_THREADS))
            self._ways = {f"{_THREADS} threads with O_DIRECT": self._by_threads}
            self._ways |= self._readers(artifact)
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways to read many records at once that work here."""
        return tuple(self._ways)

    def single_seconds(self, ids: Sequence[int]) -> list[float]:
        """Read records one after the other; return what each took. The first is not counted."""
        buffer = self._buffer()
        return [self._timed_read(token, buffer) for token in ids][1:]

    def batch_rate(self, way: str, ids: Sequence[int]) -> float:
        """Read records at once in one of the ways; return bytes of records per second."""
        self._evict()
        start = perf_counter()
        self._ways[way](ids)
        seconds = perf_counter() - start
        return sum(self._locate(token)[1] for token in ids) / seconds

    def _open_direct(self, artifact: Artifact, name: str) -> int:
        if not hasattr(os, "O_DIRECT"):
            raise RuntimeUnavailableError("This system has no O_DIRECT.")
        plain = artifact.open_file(name)
        self._opened.callback(os.close, plain)
        try:
            file = os.open(f"/proc/self/fd/{plain}", os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            raise RuntimeUnavailableError(
                f"The table cannot be opened with O_DIRECT ({error.strerror})."
            ) from error
        self._opened.callback(os.close, file)
        return file

    def _found_alignment(self, alignment: int, offset: int) -> int:
        """The smallest unit the device takes: that of the records, or a page."""
        for self._alignment in (alignment, max(alignment, _PAGE)):
            try:
                self._read(offset, self._largest, self._buffer())
            except OSError:
                continue
            return self._alignment
        raise RuntimeUnavailableError("The table's file system takes no direct reads.")

    def _readers(self, artifact: Artifact) -> dict[str, Batch]:
        """Our own readers, as far as this system has them."""
        ways: dict[str, Batch] = {}
        for name in _READERS:
            try:
                table = self._open_table(artifact, name)
            except (RequestError, RuntimeUnavailableError, StorageError):
                continue
            ways[f"reader {name}"] = partial(_fetch, table)
        return ways

    def _open_table(self, artifact: Artifact, reader: str) -> Table:
        table = Table.open(artifact, reader)
        self._opened.callback(table.close)
        return table

    def _by_threads(self, ids: Sequence[int]) -> None:
        shares = [ids[number::_THREADS] for number in range(_THREADS)]
        list(self._pool.map(self._read_all, shares))

    def _read_all(self, ids: Sequence[int]) -> None:
        buffer = self._buffer()
        for token in ids:
            self._read(*self._locate(token), buffer)

    def _timed_read(self, token: int, buffer: mmap.mmap) -> float:
        offset, record_bytes = self._locate(token)
        start = perf_counter()
        self._read(offset, record_bytes, buffer)
        return perf_counter() - start

    def _read(self, offset: int, record_bytes: int, buffer: mmap.mmap) -> None:
        aligned = offset // self._alignment * self._alignment
        wanted = offset + record_bytes - aligned
        size = -(-wanted // self._alignment) * self._alignment
        with memoryview(buffer)[:size] as target:
            for _ in range(_TRIES):  # a read may come back short; one that does is not timed well
                count = os.preadv(self._file, [target], aligned)
                if count >= wanted:
                    return
        raise StorageError(
            f"The table gives {count} bytes from byte {aligned} on, expected {wanted}. If it was "
            "cut short meanwhile, copy the artifact again."
        )

    def _buffer(self) -> mmap.mmap:
        """Memory that starts on a page, as direct reads want, and holds any record."""
        return mmap.mmap(-1, self._largest + 2 * self._alignment)


def _fetch(table: Table, ids: Sequence[int]) -> None:
    table.fetch(np.asarray(ids, np.int64), RecordBuffer(table.layout, len(ids)))
