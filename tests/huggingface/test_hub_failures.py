from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import sealed
from edge_memllm.errors import (
    ArtifactError,
    CorruptionError,
    RequestError,
    RuntimeUnavailableError,
    StorageError,
)
from edge_memllm.hub import HubModel, artifact_folder
from edge_memllm.hub.download import download_artifact
from support.checkpoints import files_of
from support.hub import COMMIT, NAME, FakeHub, serving

MODEL = HubModel(NAME)
TABLE = "table.safetensors"


def test_a_private_model_needs_the_token(hub: FakeHub, folder: Path) -> None:
    hub.token = "hf_secret"
    with pytest.raises(ArtifactError, match=r"no such model.*or it is private.*hf auth login"):
        download_artifact(MODEL, token=False)
    assert files_of(download_artifact(MODEL, token="hf_secret")) == files_of(folder)


def test_the_token_does_not_leave_the_hub(hub: FakeHub, folder: Path) -> None:
    hub.token = "hf_secret"
    store = FakeHub(files=hub.files, forbidden="Authorization")
    with serving(store):
        # By another name: before 2.0 the library took every port of a host for the Hub.
        hub.moved_to = store.endpoint.replace("127.0.0.1", "localhost")
        assert files_of(download_artifact(MODEL, token="hf_secret")) == files_of(folder)
    assert sorted(store.downloads()) == sorted(file.name for file in folder.iterdir())


def test_a_folder_the_library_downloaded_can_be_used(hub: FakeHub, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    place = snapshot_download(NAME, local_dir=tmp_path / "place")
    with Artifact.open(artifact_folder(place)) as artifact:
        artifact.verify_digests()


def test_a_gated_model_is_asked_for_on_its_page(hub: FakeHub) -> None:
    hub.gated = NAME
    with pytest.raises(ArtifactError, match=r"access to this model must be granted"):
        download_artifact(MODEL)


def test_a_model_or_a_revision_that_is_not_there(hub: FakeHub) -> None:
    with pytest.raises(ArtifactError, match=r"^some/other: no such folder is here and no"):
        download_artifact(HubModel("some/other"))
    with pytest.raises(ArtifactError, match=r"^some/model@v2: the model has no such revision"):
        artifact_folder(f"hf://{NAME}@v2")
    assert artifact_folder(NAME, revision=COMMIT).is_dir()


def test_a_name_the_library_refuses(hub: FakeHub) -> None:
    with pytest.raises(RequestError, match=r"^a--b/c: "):
        download_artifact(HubModel("a--b/c"))


def test_a_repository_without_a_manifest_is_no_artifact(hub: FakeHub) -> None:
    del hub.files[NAME]["manifest.json"]
    with pytest.raises(ArtifactError, match=r"has no manifest\.json\. It is no exported artifact"):
        download_artifact(MODEL)


def test_a_manifest_that_names_a_path_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    manifest = json.loads(hub.files[NAME]["manifest.json"])
    manifest["files"]["../../evil.json"] = manifest["files"].pop("tokenizer.json")
    hub.files[NAME]["manifest.json"] = sealed(manifest)
    with pytest.raises(ArtifactError, match=r"^some/model: manifest\.json: .*plain file name"):
        download_artifact(MODEL)
    assert not (tmp_path / "assets").exists()


def test_a_file_that_was_not_uploaded(hub: FakeHub) -> None:
    del hub.files[NAME]["graph.onnx"]
    with pytest.raises(ArtifactError, match=r"the Hugging Face Hub has no graph\.onnx\.$"):
        download_artifact(MODEL)


def test_a_file_of_another_size_does_not_come(hub: FakeHub) -> None:
    hub.files[NAME]["graph.onnx"] += b"!"
    with pytest.raises(CorruptionError, match=r"graph\.onnx has \d+ bytes .*upload it again"):
        download_artifact(MODEL)
    assert "graph.onnx" not in hub.downloads()


def test_damaged_bytes_are_found_and_not_kept(hub: FakeHub, folder: Path) -> None:
    whole = hub.files[NAME][TABLE]
    hub.files[NAME][TABLE] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(CorruptionError, match=r"table\.safetensors has arrived with sha256 .*Try"):
        download_artifact(MODEL)
    hub.files[NAME][TABLE] = whole
    assert files_of(download_artifact(MODEL)) == files_of(folder)


@pytest.mark.parametrize("name", ["manifest.json", "graph.onnx", TABLE])
def test_a_server_that_never_ends_is_left(
    name: str, hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    hub.endless = name
    with pytest.raises(ArtifactError, match=rf"{name}.* arrive"):
        download_artifact(MODEL)
    assert hub.sent < 100 << 20
    kept = sum(each.stat().st_size for each in tmp_path.rglob("*") if each.is_file())
    assert kept < 20 << 20
    hub.endless = None
    assert files_of(download_artifact(MODEL, force_download=True)) == files_of(folder)


def test_an_unfinished_file_that_is_too_long_starts_anew(hub: FakeHub, folder: Path) -> None:
    found = download_artifact(MODEL)
    (found / ".partial").mkdir()
    (found / ".partial" / TABLE).write_bytes(bytes(10 + (found / TABLE).stat().st_size))
    (found / TABLE).unlink()
    assert files_of(download_artifact(MODEL)) == files_of(folder)


def test_a_full_disk_is_seen_before_anything_comes(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    with pytest.raises(StorageError, match=r"bytes are to be downloaded, 20,000 are free.*HF_HOME"):
        download_artifact(MODEL)
    assert TABLE not in hub.downloads()


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (OSError(28, "No space left on device"), StorageError, "^some/model: the disk is full"),
        (PermissionError(13, "Permission denied", "place"), StorageError, "^place: Permission"),
        (ValueError("The file is too large"), ArtifactError, "cannot be downloaded: The file is"),
    ],
)
def test_other_failures_are_told_as_they_are(
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    error: type[Exception],
    message: str,
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("huggingface_hub.file_download.http_get", failing)
    with pytest.raises(error, match=message):
        download_artifact(MODEL)


def test_without_the_library_the_error_names_the_extra(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install '\.\[hub\]'"):
        artifact_folder(NAME)
