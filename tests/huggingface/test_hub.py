from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import (
    ArtifactError,
)
from edge_memllm.hub import HubModel, artifact_folder, checkpoint_folder
from edge_memllm.hub.download import download_artifact
from support.checkpoints import files_of
from support.hub import NAME, FakeHub

MODEL = HubModel(NAME)
TABLE = "table.safetensors"


def test_a_local_folder_always_wins(hub: FakeHub, folder: Path) -> None:
    shutil.copytree(folder, NAME)
    assert artifact_folder(NAME) == Path(NAME)
    assert checkpoint_folder(NAME) == Path(NAME)
    assert hub.asked == []


def test_a_folder_that_is_missing_from_a_folder_is_not_looked_up(hub: FakeHub) -> None:
    Path("some").mkdir()
    with pytest.raises(ArtifactError, match=r"^some/model: does not exist.*write hf://some/model"):
        artifact_folder(NAME)
    assert hub.asked == []
    assert artifact_folder(f"hf://{NAME}").is_dir()


def test_only_what_the_manifest_names_is_downloaded(hub: FakeHub, folder: Path) -> None:
    found = artifact_folder(NAME)
    assert files_of(found) == files_of(folder)
    assert sorted(hub.downloads()) == sorted(file.name for file in folder.iterdir())
    assert not any(path.is_symlink() for path in found.iterdir())
    with Artifact.open(found) as artifact:
        artifact.verify_digests()


def test_what_is_there_is_not_downloaded_again(hub: FakeHub) -> None:
    first = download_artifact(MODEL)
    hub.asked.clear()
    assert download_artifact(MODEL) == first
    assert hub.downloads() == []
    (first / "graph.onnx").unlink()
    download_artifact(MODEL)
    assert hub.downloads() == ["graph.onnx"]


def test_another_readme_does_not_make_another_download(hub: FakeHub) -> None:
    first = download_artifact(HubModel(NAME, "v1"))
    hub.files[NAME]["README.md"] = b"# better words"
    hub.asked.clear()
    assert download_artifact(MODEL) == first
    assert set(hub.downloads()) <= {"manifest.json"}


def test_force_download_starts_from_nothing(hub: FakeHub, folder: Path) -> None:
    found = download_artifact(MODEL)
    (found / TABLE).write_bytes(bytes((found / TABLE).stat().st_size))  # the size is right
    assert files_of(download_artifact(MODEL)) != files_of(folder)
    assert files_of(download_artifact(MODEL, force_download=True)) == files_of(folder)


def test_a_broken_connection_goes_on_where_it_broke(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.break_after[TABLE] = 5000
    assert files_of(download_artifact(MODEL)) == files_of(folder)
    assert [wanted for method, name, wanted in hub.asked if (method, name) == ("GET", TABLE)] == [
        "",
        "bytes=5000-",
    ]


def test_an_interrupted_download_goes_on_in_the_next_process(hub: FakeHub, folder: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(Path("home").resolve()),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    statement = f"from edge_memllm.hub import artifact_folder; print(artifact_folder({NAME!r}))"
    command = [sys.executable, "-c", statement]
    killed = (
        "import os\nfrom pathlib import Path\nfrom huggingface_hub import file_download\n"
        "def dying(url, file, **options):\n"
        "    if options.get('displayed_filename') == 'table.safetensors':\n"
        "        file.write(Path('source/table.safetensors').read_bytes()[:7000])\n"
        "        file.flush(); os._exit(9)\n"
        "    return get(url, file, **options)\n"
        "get, file_download.http_get = file_download.http_get, dying\n"
    )
    done = subprocess.run([sys.executable, "-c", killed + statement], env=environment, timeout=60)
    assert done.returncode == 9
    hub.asked.clear()
    done = subprocess.run(command, env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(Path(done.stdout.strip())) == files_of(folder)
    assert ("GET", TABLE, "bytes=7000-") in hub.asked


def test_without_a_connection_what_is_there_is_used(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = download_artifact(MODEL)
    hub.asked.clear()
    assert download_artifact(MODEL, local_files_only=True) == found
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download_artifact(MODEL) == found
    assert hub.asked == []
    (found / TABLE).unlink()
    with pytest.raises(ArtifactError, match=r"^some/model: not downloaded yet: table\.safetensors"):
        download_artifact(MODEL, local_files_only=True)
    with pytest.raises(
        ArtifactError, match=r"the Hugging Face Hub cannot be asked for .*: .*offline"
    ):
        download_artifact(MODEL)


@pytest.mark.parametrize("options", [{"local_files_only": True}, {}])
def test_without_a_connection_and_a_copy_the_error_says_so(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not options)
    with pytest.raises(ArtifactError, match=r"^some/model: no such folder is here.*be asked"):
        download_artifact(MODEL, **options)
    assert hub.asked == []


def test_a_hub_that_is_gone(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(
        ArtifactError, match=r"cannot be asked for .*: .*refused\. Check the connection"
    ):
        download_artifact(MODEL)


def test_files_of_the_librarys_own_cache_are_taken_from_there(hub: FakeHub, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(NAME)
    hub.asked.clear()
    assert files_of(download_artifact(MODEL)) == files_of(folder)
    assert hub.downloads() == []


def test_another_cache_can_be_given(hub: FakeHub, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert elsewhere in download_artifact(MODEL, cache_dir=elsewhere).parents
    assert not (tmp_path / "assets").exists()
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_comes_without_what_no_export_reads(hub: FakeHub) -> None:
    hub.files["some/checkpoint"] = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"a pickle",
        "modeling_custom.py": b"code",
        "README.md": b"words",
    }
    found = checkpoint_folder("some/checkpoint")
    assert {path.name for path in found.iterdir()} == {"config.json", "model.safetensors"}
    assert checkpoint_folder("hf://some/checkpoint@main", revision="v1") == found
    with pytest.raises(ArtifactError, match=r"^some/other: no such folder is here and no"):
        checkpoint_folder("some/other")


def test_load_and_the_command_line_take_names_of_the_hub(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_memllm.cli.main import main

    with pytest.raises(ArtifactError, match=r"graph\.onnx: not an ONNX graph"):
        edge_memllm.load(NAME)  # arrived, and found to be what the test wrote
    hub.asked.clear()
    assert main(["inspect", NAME]) == 0
    assert "int8-g32" in capsys.readouterr().out
    assert main(["run", "hf://some/nothing", "--prompt", "x"]) == 1
    assert "no such model on the Hugging Face Hub" in capsys.readouterr().err
