"""Files and folders that appear whole, whatever the file system and the moment of a death."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.artifact import atomic
from edge_memllm.artifact.atomic import (
    FolderLock,
    WholeFile,
    clear_leftovers,
    move_whole,
    whole_folder,
    write_all,
    write_whole,
)
from edge_memllm.errors import RequestError, StorageError
from edge_memllm_export.staging import Staging


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def fail_folders(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let fsync of a folder fail, and that of a file succeed."""
    real = os.fsync

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)


# --- a file --------------------------------------------------------------------------------------


def test_it_appears_when_it_is_published(tmp_path: Path) -> None:
    with WholeFile(tmp_path / "a", mode=0o600) as file:
        file.write(b"....three")
        file.seek(0)
        file.write(b"two ")
        assert "a" not in names(tmp_path)
        file.publish()
    assert (tmp_path / "a").read_bytes() == b"two three"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    write_whole(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("death", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_what_ends_early_leaves_nothing(death: Any, tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    with pytest.raises((KeyboardInterrupt, OSError)), WholeFile(tmp_path / "a") as file:
        file.write(b"new")
        raise death
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "old")


def test_what_is_there_is_refused_or_replaced(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    with pytest.raises(RequestError, match=r"a: there is a file already\. Choose another name"):
        WholeFile(tmp_path / "a", overwrite=False)
    with (
        pytest.raises(RequestError, match="b: there is a file already"),
        WholeFile(tmp_path / "b", overwrite=False) as file,
    ):
        write_whole(tmp_path / "b", "of somebody else, meanwhile")
        file.publish()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(RequestError, match=f"{name}: is not a file, so it is not replaced"):
            write_whole(tmp_path / name, "new")
    assert names(tmp_path) == ["a", "b", "folder", "pipe"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"The disk is full: free some space"),
        (errno.EROFS, r"Choose a folder that you may write to"),
        (errno.EIO, r"Check the disk and the folder"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_every_failure_names_the_file(
    call: str, number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(StorageError, match=rf"/a: cannot be written \(.*\)\. {words}"):
            write_whole(tmp_path / "a", "text")
    assert names(tmp_path) == []


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"/no/a: cannot be written .* Make the folder first"):
        write_whole(tmp_path / "no" / "a", "text")


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_short_writes_are_continued(most: int, tmp_path: Path, monkeypatch: Any) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data)[:most]))
    rows = memoryview(bytes(range(24))).cast("B", (4, 6))  # a slice of it would be rows
    with WholeFile(tmp_path / "a") as file:
        assert file.write(rows) == 24
        assert file.write(memoryview(b"").cast("B")) == 0
        file.publish()
    assert (tmp_path / "a").read_bytes() == bytes(range(24))


def test_nothing_to_write_is_no_call(tmp_path: Path) -> None:
    import numpy as np

    assert write_all(-1, np.zeros((0, 8), np.uint8).data) == 0


# --- file systems that lack something ------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_folders_that_cannot_be_forced_to_the_disk(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_folders(monkeypatch, number)
    write_whole(tmp_path / "a", "text")
    (tmp_path / "b").write_text("b")
    move_whole(tmp_path / "b", tmp_path / "c")
    with whole_folder(tmp_path / "d") as draft:
        (draft / "file").write_text("text")
    with Staging(tmp_path / "e", overwrite=False) as staging:
        (staging.path / "file").write_text("text")
        staging.publish()
    assert names(tmp_path) == ["a", "c", "d", "e"]


def test_a_folder_that_the_disk_fails_on_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_folders(monkeypatch, errno.EIO)
    with pytest.raises(StorageError, match=r"a: is written, but its folder could not be forced"):
        write_whole(tmp_path / "a", "text")
    with pytest.raises(OSError, match="Input/output"), whole_folder(tmp_path / "d"):
        pass
    with (
        pytest.raises(OSError, match="Input/output"),
        Staging(tmp_path / "e", overwrite=False) as s,
    ):
        s.publish()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
def test_file_systems_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    old, young = (tmp_path / f".edge-memllm-{each}.partial" for each in ("00000000", "11111111"))
    for each in (old, young):
        each.write_text("half")
    os.utime(old, (0, 0))
    write_whole(tmp_path / "a", "text")
    assert names(tmp_path) == [young.name, "a"]  # somebody may be writing it
    with (
        caplog.at_level(logging.WARNING),
        Staging(tmp_path / "out", overwrite=False) as staging,
    ):
        (staging.path / "file").write_text("text")
        staging.publish()
    assert "this file system has no locks, so another export" in caplog.text
    assert names(tmp_path) == [young.name, "a", "out"]


# --- killed processes ----------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from pathlib import Path
from edge_memllm.artifact.atomic import WholeFile, whole_folder
with WholeFile(sys.argv[1] + "/a") as file, whole_folder(Path(sys.argv[1]) / "b") as folder:
    file.write(b"half"); (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_to_write_clears_what_the_killed_have_left(tmp_path: Path) -> None:
    with (
        WholeFile(tmp_path / "mine") as file,
        closing(FolderLock(tmp_path)),
        whole_folder(tmp_path / "folder") as draft,
    ):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
        assert len(names(tmp_path)) == 4  # two of ours, two of the dead
        write_whole(tmp_path / "c", "text")
        assert len(names(tmp_path)) == 3
        assert draft.is_dir()
        file.publish()
    assert names(tmp_path) == ["c", "folder", "mine"]


def test_what_has_another_name_is_left_alone(tmp_path: Path) -> None:
    for name in (".edge-memllm-1.partial", "edge-memllm-00000000.partial", ".x-00000000.partial"):
        (tmp_path / name).write_text("of somebody else")
    (tmp_path / ".edge-memllm-00000000.partial").symlink_to(tmp_path / ".x-00000000.partial")
    clear_leftovers(tmp_path)
    clear_leftovers(tmp_path / "no such folder")
    assert len(names(tmp_path)) == 4


def test_a_draft_that_was_taken_for_a_leftover_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody clears leftovers between our making a draft and locking it."""
    real, once = atomic.try_lock, iter([True])

    def late(file: int) -> bool | None:
        if next(once, False):
            clear_leftovers(tmp_path)
        return real(file)

    monkeypatch.setattr(atomic, "try_lock", late)
    write_whole(tmp_path / "a", "text")
    once = iter([True])
    with whole_folder(tmp_path / "b") as draft:
        (draft / "file").write_text("text")
    assert names(tmp_path) == ["a", "b"]
