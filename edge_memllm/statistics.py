"""What a generation cost: times, bytes read, memory. Plain numbers, ready for JSON.

Reads the costs of the steps and the system's account of the process; changes nothing.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from edge_memllm.engine.feeding import StepCosts
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.source import RecordSource

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_LARGE_BLOCK = 1 << 20
_PROC_STATUS = Path("/proc/self/status")
_PROC_KEYS = {
    "RssAnon": "anon_bytes",
    "RssFile": "file_bytes",
    "VmHWM": "peak_bytes",
    "VmSwap": "swap_bytes",
}


@dataclass(frozen=True, slots=True)
class GenerationStatistics:
    """What one generation did. Rates are None when there was nothing to measure."""

    prompt_tokens: int
    completion_tokens: int  # chosen tokens, an end-of-text token among them
    time_to_first_token_seconds: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None  # over the tokens after each first one
    table_bytes_read: int  # of records, from memory when the reader is "ram"
    table_bytes_read_per_token: float  # of prompt and completion; rejected drafts are read too
    reads_per_token: float  # reading calls to the system
    record_wait_seconds: float  # when nothing was computed because records were not there yet
    draft_tokens: int  # proposed by speculation
    accepted_tokens: int  # of these, chosen
    rss_anon_bytes: int | None
    rss_file_bytes: int | None
    peak_rss_bytes: int | None  # the most that both were together, ever
    swap_bytes: int | None  # of its own, what the system has put elsewhere
    kv_bytes: int
    seed: int
    device: str
    reader: str
    overlays: tuple[str, ...] = ()  # names of those that were on, in their order

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


class Meter:
    """Measures one generation from the moment it is made."""

    def __init__(
        self, runtime: Runtime, table: RecordSource, seed: int, overlays: tuple[str, ...] = ()
    ) -> None:
        self.costs = StepCosts()
        self._overlays = overlays
        self._runtime = runtime
        self._table = table
        self._seed = seed
        self._start = perf_counter()
        self._first_token_seconds = 0.0

    def note_first_token(self) -> None:
        """Note that the first token has come."""
        self._first_token_seconds = perf_counter() - self._start

    def statistics(self, completion_tokens: int) -> GenerationStatistics:
        """Return what was measured until this many tokens had come."""
        costs, memory = self.costs, process_memory()
        fed = costs.prefill_tokens + costs.decode_tokens
        return GenerationStatistics(
            prompt_tokens=costs.prefill_tokens,
            completion_tokens=completion_tokens,
            time_to_first_token_seconds=self._first_token_seconds,
            prefill_tokens_per_second=rate(costs.prefill_tokens, costs.prefill_seconds),
            decode_tokens_per_second=rate(costs.decode_tokens, costs.decode_seconds),
            table_bytes_read=costs.bytes_read,
            table_bytes_read_per_token=costs.bytes_read / max(1, fed),
            reads_per_token=costs.reads / max(1, fed),
            record_wait_seconds=costs.wait_seconds,
            draft_tokens=costs.draft_tokens,
            accepted_tokens=costs.accepted_tokens,
            rss_anon_bytes=memory.anon_bytes,
            rss_file_bytes=memory.file_bytes,
            peak_rss_bytes=memory.peak_bytes,
            swap_bytes=memory.swap_bytes,
            kv_bytes=costs.kv_bytes,
            seed=self._seed,
            device=self._runtime.device,
            reader=self._table.reader_name,
            overlays=self._overlays,
        )


def rate(count: int, seconds: float) -> float | None:
    """Return count per second, or None when there was nothing to measure."""
    return count / seconds if count and seconds > 0 else None


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Memory of this process in bytes, resident but for the last; None where nobody tells."""

    anon_bytes: int | None = None  # its own: weights, keys and values, buffers
    file_bytes: int | None = None  # pages of mapped files, which the system may drop
    peak_bytes: int | None = None  # the most it ever was, of both together
    swap_bytes: int | None = None  # its own, but swapped out or compressed


def process_memory() -> ProcessMemory:
    """Read the memory of this process: all of it on Linux, the peak elsewhere on Unix."""
    try:
        status = _PROC_STATUS.read_text(encoding="ascii")
    except OSError:
        return ProcessMemory(peak_bytes=_peak_from_resource())
    return parse_proc_status(status)


def parse_proc_status(text: str) -> ProcessMemory:
    """Parse the text of Linux' `/proc/self/status`, whose sizes are in KiB."""
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key in _PROC_KEYS:
            found[_PROC_KEYS[key]] = int(value.split()[0]) * 1024
    return ProcessMemory(**found)


def _peak_from_resource() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Return what is free to the system. Does nothing where the C library has no such call."""
    if sys.platform.startswith("linux"):
        # glibc keeps up to some ten MB of what it frees, and what lies below something in use.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def give_back_large_blocks() -> None:
    """From now on, return large blocks to the system as soon as they are freed.

    For a process that loads models again and again: glibc keeps blocks of up to 32 MB once some
    were freed, so that each loading would begin in what the one before has left in pieces. Does
    nothing where the C library has no such call.
    """
    if sys.platform.startswith("linux"):
        choose = getattr(ctypes.CDLL(None), "mallopt", None)
        if choose is not None:
            choose(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
