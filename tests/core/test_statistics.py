from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_memllm import statistics
from edge_memllm.statistics import (
    Meter,
    ProcessMemory,
    parse_proc_status,
    process_memory,
    rate,
)
from edge_memllm.table.source import Fetched
from edge_memllm_runtimes.fake import FakeRuntime

STATUS = """\
Name:\tpython
VmHWM:\t  300 kB
RssAnon:\t  100 kB
RssFile:\t   50 kB
VmSwap:\t    2 kB
Threads:\t3
"""


def test_the_status_file_of_linux_is_read_in_bytes() -> None:
    assert parse_proc_status(STATUS) == ProcessMemory(102400, 51200, 307200, 2048)


def test_what_an_old_kernel_does_not_tell_is_none() -> None:
    assert parse_proc_status("VmHWM:\t300 kB\n") == ProcessMemory(None, None, 307200)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' account")
def test_memory_of_this_process_follows_what_it_allocates() -> None:
    before = process_memory().anon_bytes
    array = np.ones(1 << 24)  # far beyond what freed memory of the process might have room for
    after = process_memory()
    assert before is not None
    assert after.anon_bytes is not None
    assert after.peak_bytes is not None
    assert after.anon_bytes - before > 0.8 * array.nbytes
    assert after.peak_bytes >= after.anon_bytes


def test_without_the_status_file_the_peak_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("resource")
    monkeypatch.setattr(statistics, "_PROC_STATUS", tmp_path / "none")
    memory = process_memory()
    assert memory.anon_bytes is None
    assert memory.file_bytes is None
    assert memory.peak_bytes is not None
    assert memory.peak_bytes > 1 << 20


def test_without_any_account_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(statistics, "_PROC_STATUS", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert process_memory() == ProcessMemory(None, None, None)


def test_a_rate_needs_something_to_measure() -> None:
    assert rate(10, 2.0) == 5.0
    assert rate(0, 2.0) is None
    assert rate(10, 0.0) is None


def test_bytes_are_those_that_were_read() -> None:
    table = SimpleNamespace(reader_name="pread")
    meter = Meter(FakeRuntime(300), table, 0)  # type: ignore[arg-type]
    meter.costs.note_records(10, Fetched(reads=3, bytes=700))
    meter.costs.note_records(4, Fetched(reads=0, bytes=0))  # all were in the record cache
    meter.costs.prefill_tokens, meter.costs.wait_seconds = 4, 0.5
    found = meter.statistics(3)
    assert meter.costs.records_read == 14
    assert (found.table_bytes_read, found.table_bytes_read_per_token) == (700, 175)
    assert found.reads_per_token == 0.75
    assert found.record_wait_seconds == 0.5
