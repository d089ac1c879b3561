"""How fast this machine's memory can be read: numpy reductions over a large array.

A reduction reads every byte once and writes nothing, as a decode step does with the weights.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from edge_memllm import __version__
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.errors import RequestError, RuntimeUnavailableError, StorageError
from edge_memllm.table.table import Table

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact


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

_DEVICES = Path("/sys/dev/block")
_MOUNTS = Path("/proc/self/mountinfo")

_THREADS = 16
_TRIES = 16
_BLOCK = 512  # what storage addresses
_PAGE = 4096  # devices that cannot address less want reads of whole pages
_READERS = ("direct", "uring", "pread")

Batch = Callable[[Sequence[int]], None]

_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "xxhash")

# Angles by position: a step takes one row of them.
_BY_POSITION = {"cos_cache", "sin_cache"}


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


@contextmanager
def evictor(path: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that drops the pages of the file at ``path`` from the page cache.

    Raises `RuntimeUnavailableError` where the system cannot do that. A disk or a hypervisor may
    keep a cache of its own behind the system's.
    """
    if not hasattr(os, "posix_fadvise"):
        raise RuntimeUnavailableError(
            f"--cache cold needs posix_fadvise, which {platform.system()} does not have. "
            "Measure with --cache warm or resident, or on Linux."
        )
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # pages that are not yet written cannot be dropped
        yield lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def cached_share(path: Path) -> float | None:
    """Return the share of a file's pages that are in the page cache; None where none can tell.

    Asks `mincore` about a mapping that is never touched, so asking brings nothing in.
    """
    try:
        ask = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of no name
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        states = np.zeros(pages, np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        failed = ask(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(len(mapped)),
            ctypes.c_void_p(states.ctypes.data),
        )
        del view  # a mapping with views cannot be closed
    return None if failed else float(np.count_nonzero(states & 1) / pages)


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
        """The smallest unit the device takes: that of the records, a block at least, or a page."""
        for self._alignment in (max(alignment, _BLOCK), max(alignment, _PAGE)):
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


def environment() -> dict[str, Any]:
    """Return what a reader of the figures must know of this machine."""
    from edge_memllm_runtimes.options import physical_cores

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


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of all weights of the graph, as stored.

    Neither the table nor an embedding is in the graph, so every weight is read once per step.
    """
    from edge_memllm_runtimes.graph_file import read_graph

    graph = read_graph(artifact.read_bytes(artifact.manifest.graph.file))
    tensors = graph.tensors.values()
    return sum(each.size for each in tensors if each.name not in _BY_POSITION)
