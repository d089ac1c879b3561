"""Artifacts that are damaged, mixed up or made to do harm: each must end in a typed error."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm.artifact import folder as directory
from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ArtifactError, CorruptionError, StorageError
from edge_memllm.table.table import Table
from support.checkpoints import MakeArtifact
from support.small_model import IDENTITY, OTHER_IDENTITY, SmallArtifact, flip, write_artifact

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

HEADER = 4096


@pytest.fixture(params=["relative", "plain"])
def opening(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Open files relative to the folder's descriptor, and as a system does that cannot."""
    if request.param == "plain":
        monkeypatch.setattr(os, "supports_dir_fd", set())
        monkeypatch.setattr(directory, "_FLAGS", os.O_RDONLY | os.O_NONBLOCK)
    return request.param


def open_and_close(path: Path) -> None:
    with Artifact.open(path) as artifact:
        Table.open(artifact).close()


# --- the folder ------------------------------------------------------------------------------


def test_good_artifact_opens(small: SmallArtifact, opening: str) -> None:
    with Artifact.open(str(small.path)) as artifact:
        assert artifact.path == small.path
        assert artifact.manifest == small.manifest
        assert artifact.read_bytes("tokenizer.json") == b"{}\n"
        artifact.verify_digests()
        Table.open(artifact).close()
    artifact.close()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere: does not exist, expected the folder of"):
        Artifact.open(tmp_path / "nowhere")


def test_file_instead_of_a_folder(small: SmallArtifact) -> None:
    with pytest.raises(ArtifactError, match=r"graph.onnx: is not a folder, expected the folder"):
        Artifact.open(small.path / "graph.onnx")


def test_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest.json: the file is missing"):
        Artifact.open(tmp_path)


def test_folder_that_fails_to_open(small: SmallArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "supports_dir_fd", {refuse})
    with pytest.raises(ArtifactError, match=r"artifact: cannot be opened \(Permission denied\)"):
        Artifact.open(small.path)


def test_folder_may_be_a_link(small: SmallArtifact, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small.path)
    open_and_close(tmp_path / "link")


def test_read_only_folder(small: SmallArtifact) -> None:
    for file in small.path.iterdir():
        file.chmod(0o400)
    small.path.chmod(0o500)
    open_and_close(small.path)
    small.path.chmod(0o700)


def test_other_files_are_ignored(small: SmallArtifact) -> None:
    (small.path / "notes.txt").symlink_to("/dev/zero")
    (small.path / ".hidden").mkdir()
    open_and_close(small.path)
    with Artifact.open(small.path) as artifact:
        for name in ("notes.txt", "manifest.json", "../artifact/graph.onnx", "/dev/zero"):
            with pytest.raises(ArtifactError, match=r"not listed in manifest\.json, not opened"):
                artifact.open_file(name)


# --- files that are not what they seem ---------------------------------------------------------


def symbolic_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "nowhere")


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, outside: Path) -> None:
    path.mkdir()


def device(path: Path, outside: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))  # /dev/null
    except PermissionError:
        pytest.skip("only root can make a device")


def bound_socket(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # a socket's path must be short
        server.bind(path.name)
        os.fchdir(here)
        os.close(here)


def missing(path: Path, outside: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (symbolic_link, "the file is a symbolic link, expected a regular file"),
        (dangling_link, "the file is a symbolic link, expected a regular file"),
        (pipe, "this is a pipe, expected a regular file"),
        (folder, "this is a folder, expected a regular file"),
        (device, "this is a device or socket, expected a regular file"),
        (bound_socket, r"cannot be opened \(No such device or address\)"),
        (missing, "the file is missing. The copy is incomplete"),
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "graph.onnx", "table.safetensors"])
def test_only_plain_files_are_opened(
    small: SmallArtifact,
    tmp_path: Path,
    opening: str,
    name: str,
    replace: Callable[[Path, Path], None],
    message: str,
) -> None:
    outside = tmp_path / "outside"
    shutil.move(small.path / name, outside)
    replace(small.path / name, outside)
    with pytest.raises(ArtifactError, match=f"{name}: {message}"):
        Artifact.open(small.path)


def test_hard_links_are_the_files_themselves(
    small: SmallArtifact, tmp_path: Path, opening: str
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in small.path.iterdir():
        (linked / file.name).hardlink_to(file)
    open_and_close(linked)


# --- files that differ from the manifest -------------------------------------------------------


@pytest.mark.parametrize("name", ["graph.onnx", "table.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("change", [-1, 1])
def test_file_of_another_size(small: SmallArtifact, name: str, change: int) -> None:
    size = small.manifest.files[name].bytes
    os.truncate(small.path / name, size + change)
    match = f"{name}: {size + change} bytes, the manifest says {size}. The copy is incomplete"
    with pytest.raises(CorruptionError, match=match):
        Artifact.open(small.path)


@pytest.mark.parametrize("size", range(0, HEADER + 24 * 520, 512))
def test_table_cut_anywhere(small: SmallArtifact, size: int) -> None:
    os.truncate(small.table, size)
    with pytest.raises(CorruptionError, match=rf"table.safetensors: {size} bytes, the manifest"):
        Artifact.open(small.path)


@pytest.mark.parametrize("name", ["graph.onnx", "tokenizer.json"])
def test_flipped_bit_in_a_small_file(small: SmallArtifact, name: str) -> None:
    flip(small.path / name, 1)
    match = f"{name}: sha256 is [0-9a-f]{{12}}, the manifest says [0-9a-f]{{12}}. The copy"
    with pytest.raises(CorruptionError, match=match):
        Artifact.open(small.path)


def test_flipped_bit_anywhere_in_the_table_fails_verification(small: SmallArtifact) -> None:
    flip(small.table, HEADER + 511)  # padding, which is never read otherwise
    with (
        Artifact.open(small.path) as artifact,
        pytest.raises(CorruptionError, match=r"table.safetensors: sha256 is"),
    ):
        artifact.verify_digests()


def test_flipped_bit_in_the_checksums(small: SmallArtifact) -> None:
    flip(small.table, HEADER + 24 * 512 + 3)
    with pytest.raises(CorruptionError, match=r"sha256 of the checksums is .* file is damaged"):
        open_and_close(small.path)


def test_file_that_cannot_be_read(small: SmallArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", broken)
    with pytest.raises(StorageError, match=r"reading failed \(Input/output error\). Check the"):
        Artifact.open(small.path)


def test_bytes_are_those_that_were_checked(small: SmallArtifact) -> None:
    with Artifact.open(small.path) as artifact:
        (small.path / "tokenizer.json").write_bytes(b"[]\n")
        with pytest.raises(CorruptionError, match=r"tokenizer.json: sha256 is"):
            artifact.read_bytes("tokenizer.json")


def test_a_file_beyond_memory_is_one_error(
    small: SmallArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytearray:
        raise MemoryError

    with Artifact.open(small.path) as artifact:
        monkeypatch.setattr("edge_memllm.artifact.folder.bytearray", refuse, raising=False)
        with pytest.raises(StorageError, match=r"graph\.onnx: no memory for its \d+ bytes"):
            artifact.read_bytes("graph.onnx")


def test_huge_manifest_is_not_read(small: SmallArtifact) -> None:
    os.truncate(small.path / "manifest.json", 1 << 40)  # sparse: no disk is used
    with pytest.raises(ArtifactError, match=r"manifest.json: 1048577 bytes of JSON, the limit is"):
        Artifact.open(small.path)


# --- files of different exports ------------------------------------------------------------------


def test_table_of_another_model(small: SmallArtifact, tmp_path: Path) -> None:
    other = write_artifact(tmp_path / "other", identity=OTHER_IDENTITY)
    shutil.copy(other.table, small.table)
    match = f"table of model {OTHER_IDENTITY[:19]}, the manifest is for model {IDENTITY[:19]}\\."
    with pytest.raises(ArtifactError, match=match):
        open_and_close(small.path)


def test_table_of_another_width(small: SmallArtifact, tmp_path: Path) -> None:
    other = write_artifact(tmp_path / "other", width=128, layers=1)
    shutil.copy(other.table, small.table)
    with pytest.raises(ArtifactError, match='layers is "1", the manifest says "2"'):
        open_and_close(small.path)


# --- folders whose names are no text -----------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_a_folder_whose_name_is_not_utf_8_opens(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    source = make_artifact(graph_weights="int4", table_codec="int8")
    folder = os.path.join(tmp_path, os.fsdecode(b"caf\xe9"))
    shutil.copytree(source, folder)
    found = []
    for path in (source, folder):
        with edge_memllm.load(path, device="cpu", threads=1) as model:
            found.append(model.generate("text", max_new_tokens=4, ignore_eos=True))
    assert found[0] == found[1]
