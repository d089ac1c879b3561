"""Exports that die or run out of disk: OUT is whole or not there, and the next one succeeds."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ExportError
from edge_memllm_export import export_model
from edge_memllm_export.staging import Staging
from support.checkpoints import MakeArtifact, MakeCheckpoint

# --- a crash at every step of the swap ---------------------------------------------------------


class Crash(BaseException):
    """Stands for the end of the process."""


def crash_before_call(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end before its `number`-th change of a folder's entries."""
    calls = iter(range(1, 1000))

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == number:
                raise Crash
            return change(*arguments, **options)

        return call

    for name in ("rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


def publish_until_crash(out: Path, new: Path, number: int) -> bool:
    """Replace `out` by a copy of `new`; whether the crash came before the end."""
    staging = Staging(out, overwrite=True)
    staging.__enter__()
    shutil.copytree(new, staging.path, dirs_exist_ok=True)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_before_call(number, monkeypatch)
            staging.publish()
    except Crash:
        return True
    finally:
        staging._lock.close()  # all that the system does for a process that is killed
    return False


def test_crash_at_any_step_of_replacing_keeps_a_whole_artifact(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    old, new = make_artifact(), make_artifact(graph_weights="int8")
    out = tmp_path / "out"
    crashes = 0
    for number in range(1, 100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)
        crashed = publish_until_crash(out, new, number)
        # The next export puts things in order first, even if it then fails by itself.
        with pytest.raises(RuntimeError), Staging(out, overwrite=True):
            raise RuntimeError
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
        with Artifact.open(out) as artifact:
            artifact.verify_digests()
        if not crashed:
            break
        crashes += 1
    assert crashes >= 6  # two renames, and one step at least for each file of the old artifact


def test_half_removed_old_artifact_is_not_put_back(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    aside = Path(shutil.copytree(make_artifact(), tmp_path / "out.replaced"))
    (aside / "manifest.json").unlink()
    with pytest.raises(RuntimeError), Staging(tmp_path / "out", overwrite=False):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_export_that_was_published_before_us_does_not_share_our_folder(tmp_path: Path) -> None:
    """Between our making OUT.partial and locking it, its owner may rename it to OUT."""
    out = tmp_path / "out"
    first = Staging(out, overwrite=False)
    opened = os.open

    def open_late(path: Any, *arguments: Any, **options: Any) -> int:
        descriptor = opened(path, *arguments, **options)
        if not out.exists() and Path(path) == first.path and hasattr(first, "_lock"):
            first.publish()
            first._lock.close()
        return descriptor

    first.__enter__()
    (first.path / "graph.onnx").write_text("of the first")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "open", open_late)
        with pytest.raises(ExportError, match=r"out: exists already"):
            Staging(out, overwrite=False).__enter__()
    assert (out / "graph.onnx").read_text() == "of the first"


# --- a full disk -------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(kilobytes)`` mounts a file system of that size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small disk needs root")

    def make(kilobytes: int) -> Path:
        options = f"size={kilobytes}k"
        done = subprocess.run(
            [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True
        )
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        return disk

    yield make
    subprocess.run(["umount", str(disk)], capture_output=True, check=False)


@pytest.mark.parametrize("kilobytes", [4, 12, 40, 100, 200])
@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_full_disk_is_said_and_nothing_is_left(
    kilobytes: int,
    weights: str,
    small_disk: Callable[[int], Path],
    make_checkpoint: MakeCheckpoint,
) -> None:
    disk = small_disk(kilobytes)
    with pytest.raises(ExportError, match=r"the disk is full|No space left on device"):
        export_model(make_checkpoint(), disk / "out", graph_weights=weights, verify=False)
    assert list(disk.iterdir()) == []


def test_full_disk_keeps_the_old_artifact(
    small_disk: Callable[[int], Path], make_checkpoint: MakeCheckpoint
) -> None:
    disk = small_disk(300)
    out = disk / "out"
    export_model(make_checkpoint(), out, graph_weights="int4", verify=False)
    with pytest.raises(ExportError, match=r"the disk is full\. The table needs 160096 bytes"):
        export_model(make_checkpoint(), out, graph_weights="int4", verify=False, overwrite=True)
    assert [entry.name for entry in disk.iterdir()] == ["out"]
    with Artifact.open(out) as artifact:
        artifact.verify_digests()
