"""Quotas of processors' time, as the files of Linux tell them, in both versions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.process.limits import available_processors, memory_limits, processor_share
from edge_memllm_runtimes.options import physical_cores


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", "ascii")


def version_1(quota: str, period: str | None = "100000", folder: str = "") -> dict[str, str]:
    files = {f"sys/fs/cgroup/cpu/{folder}cpu.cfs_quota_us": quota}
    return files | (
        {f"sys/fs/cgroup/cpu/{folder}cpu.cfs_period_us": period} if period is not None else {}
    )


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert processor_share(tmp_path) is None
    assert available_processors(tmp_path) >= 1


@pytest.mark.parametrize(("quota", "share"), [
    ("max 100000", None), ("100000 100000", 1), ("150000 100000", 2), ("200000 100000", 2),
    ("1000 100000", 1), ("250000 50000", 5), ("50000", 1), ("", None), ("max", None), ("0 0", None),
])  # fmt: skip
def test_version_2(quota: str, share: int | None, tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota})
    assert processor_share(tmp_path) == share


@pytest.mark.parametrize(("quota", "period", "share"), [
    ("-1", "100000", None), ("100000", "100000", 1), ("110000", "100000", 2),
    ("400000", "100000", 4), ("50000", "25000", 2), ("300000", None, 3), ("5000", "100000", 1),
])  # fmt: skip
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_version_1(
    controllers: str, quota: str, period: str | None, share: int | None, tmp_path: Path
) -> None:
    write(tmp_path, {"proc/self/cgroup": f"9:memory:/other\n3:{controllers}:/\n0::/"})
    write(tmp_path, version_1(quota, period))
    assert processor_share(tmp_path) == share


@pytest.mark.parametrize(("own", "middle", "outer", "share"), [
    ("max 100000", "max 100000", "300000 100000", 3),
    ("400000 100000", "200000 100000", "max 100000", 2),
    ("100000 100000", "200000 100000", "300000 100000", 1),
])  # fmt: skip
def test_the_strictest_of_nested_groups_holds(
    own: str, middle: str, outer: str, share: int, tmp_path: Path
) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/outer/middle/own"})
    for folder, quota in (("outer/middle/own", own), ("outer/middle", middle), ("outer", outer)):
        write(tmp_path, {f"sys/fs/cgroup/{folder}/cpu.max": quota})
    assert processor_share(tmp_path) == share


def test_nested_groups_of_version_1(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "3:cpu,cpuacct:/outer/own"})
    write(tmp_path, version_1("-1", folder="outer/own/") | version_1("150000", folder="outer/"))
    assert processor_share(tmp_path) == 2


@pytest.mark.parametrize("group", ["/docker/0a1b", "/", "/../../elsewhere"])
def test_inside_a_container_the_mount_is_its_group(group: str, tmp_path: Path) -> None:
    """With a view of its own, or with the system's own names for what is mounted."""
    mount = "31 23 0:28 /docker/0a1b /sys/fs/cgroup ro,nosuid shared:9 - cgroup2 cgroup rw"
    write(tmp_path, {"proc/self/cgroup": f"0::{group}", "proc/self/mountinfo": mount})
    write(tmp_path, {"sys/fs/cgroup/cpu.max": "200000 100000"})
    assert processor_share(tmp_path) == 2


def test_trees_are_found_where_they_are_mounted(tmp_path: Path) -> None:
    """Both versions side by side, in places of their own, one with a blank in its name."""
    mounts = (
        "32 31 0:29 / /run/my\\040groups/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "50 1 8:1 / / rw - ext4 /dev/root rw\nnot a mount"
    )
    write(tmp_path, {"proc/self/mountinfo": mounts, "proc/self/cgroup": "3:cpu,cpuacct:/a\n0::/b"})
    assert processor_share(tmp_path) is None
    write(tmp_path, {"sys/fs/cgroup/unified/b/cpu.max": "500000 100000"})
    assert processor_share(tmp_path) == 5
    write(tmp_path, {"run/my groups/cpu/a/cpu.cfs_quota_us": "300000"})
    write(tmp_path, {"run/my groups/cpu/a/cpu.cfs_period_us": "100000"})
    assert processor_share(tmp_path) == 3
    write(tmp_path, {"sys/fs/cgroup/unified/b/memory.max": "4096"})
    assert list(memory_limits(tmp_path)) == [4096]


def test_threads_are_bounded_by_the_quota(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    nowhere = tmp_path / "no topology"
    assert physical_cores(nowhere, tmp_path) == available_processors(tmp_path) == 64
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"})
    assert physical_cores(nowhere, tmp_path) == available_processors(tmp_path) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert physical_cores(nowhere, tmp_path) == available_processors(tmp_path) == 1


def test_torch_keeps_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from edge_memllm.modeling import training as threads

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for share, expected in ((None, 2), (4, 2), (1, 1)):
            monkeypatch.setattr(threads, "processor_share", lambda share=share: share)
            threads.keep_to_quota()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
