"""direct: reads that bypass the page cache (O_DIRECT; F_NOCACHE on macOS).

For memory-limited containers, where the page cache would only churn, and for honest measurements.
Every fetch goes to storage, so it wants a record cache beside it.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from concurrent.futures import wait
from itertools import pairwise

from edge_memllm.errors import StorageError
from edge_memllm.process.forking import Workers
from edge_memllm.readers.reader import ASKED_FOR, Arena, OpenFile, Region, Span, scatter

_ALIGNMENTS = (512, 4096)  # of blocks, in practice
_THREADS = 8
# Fewer records than this for each thread are not worth waking it.
_LEAST_PER_THREAD = 4
# Reads in succession that may come back with less than a block before the end of the file: a signal
# or a network cuts one short, not all.
_VAIN_READS = 16


class DirectReader:
    """Reads into aligned memory, then copies; batches by a few threads, a stretch of it each.

    Raises `RequestError` where the system or the file system does not read directly.
    """

    name = "direct"

    def __init__(self, file: int, where: str, region: Region) -> None:
        self.reason = ASKED_FOR
        self.file = OpenFile(file, where)
        self._region = region
        try:
            self.file.bypass_page_cache()
            self.alignment = _find_alignment(self.file, region)
        except BaseException:
            self.file.close()
            raise
        self._arenas: list[Arena] = []  # those not in use
        self._workers = Workers(_THREADS, "edge-memllm-direct")

    def read(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        """Fill each target from its offset; see `Reader.read`."""
        threads = min(_THREADS, len(offsets) // _LEAST_PER_THREAD)
        if threads < 2:
            return self._read_in_turn(offsets, targets)
        edges = [len(offsets) * i // threads for i in range(threads + 1)]
        pieces = [slice(*pair) for pair in pairwise(edges)]
        work = [self._workers.submit(self._read_in_turn, offsets[p], targets[p]) for p in pieces]
        wait(work)  # all of them, so that nobody writes into targets when an error is raised
        return sum(piece.result() for piece in work)

    def announce(self, offsets: Sequence[int], size: int) -> None:
        """Do nothing: there is no cache to read into."""

    def close(self) -> None:
        """Close the file and end the threads."""
        self.file.close()
        self._workers.close()
        self._arenas.clear()

    def _read_in_turn(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = Arena(1, self._region, self.alignment)
        bounce = arena.slots[0]
        try:
            return sum(map(self._fill, [bounce] * len(offsets), offsets, targets))
        finally:
            self._arenas.append(arena)

    def _fill(self, bounce: memoryview, offset: int, parts: list[memoryview]) -> int:
        size = sum(map(len, parts))
        span = Span.around(offset, size, self.alignment)
        calls = done = vain = 0
        while done < span.needed:
            target = bounce[done : span.length]
            count = self.file.read_some([target], span.begin + done, size)
            calls += 1
            have = done + count
            if have >= span.needed:
                break
            aligned = have // self.alignment * self.alignment  # within a block none may go on
            vain = vain + 1 if aligned == done else 0
            done = aligned
            if vain:
                self._check_vain(vain, max(span.begin + have, offset), offset + size)
        scatter(bounce, span.skip, parts)
        return calls

    def _check_vain(self, times: int, end: int, wanted: int) -> None:
        """Raise `StorageError` if reads that came back with less than a block are no accident."""
        if self.file.size() < wanted:
            raise self.file.cut_short(end, wanted - end)
        if times == _VAIN_READS:
            raise StorageError(
                f"{self.file.where}: the device gave less than a block of {self.alignment} bytes "
                f"at {end} {times} times. Use the reader 'pread'."
            )


def _find_alignment(file: OpenFile, region: Region) -> int:
    """Return the alignment in which the device reads: the smallest that it does not refuse."""
    bounce = Arena(1, region, max(_ALIGNMENTS)).slots[0]
    for alignment in _ALIGNMENTS:
        begin = Span.around(region.start, 1, alignment).begin
        try:
            file.read_once([bounce[:alignment]], begin)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise file.failed(error, begin, alignment) from error
            refusal = error
        else:
            return alignment
    raise file.not_direct(refusal) from refusal
