"""OUT and the folders beside it: what an export may replace, and what it leaves alone."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ExportError
from edge_memllm_export import export_model
from support.checkpoints import files_of


def test_existing_folder_is_refused_and_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "out", verify=False)
    before = files_of(tmp_path / "out")
    with pytest.raises(ExportError, match=r"out: exists already\. Choose another folder"):
        export_model(checkpoint, tmp_path / "out", graph_weights="int8", verify=False)
    assert files_of(tmp_path / "out") == before


def test_overwrite_replaces_an_artifact(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(checkpoint, out, verify=False)
    (out / "chat_template.jinja").write_text("of the old artifact")
    report = export_model(checkpoint, out, graph_weights="fp32", verify=False, overwrite=True)
    assert set(files_of(out)) == {*report.manifest.files, "manifest.json"}
    assert json.loads((out / "manifest.json").read_text())["graph"]["weights"] == "fp32"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_overwrite_that_fails_keeps_the_old_artifact(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "out", verify=False)
    before = files_of(tmp_path / "out")
    with pytest.raises(ExportError, match=r"The quality text gives 0 tokens"):
        export_model(checkpoint, tmp_path / "out", quality_text="", overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "folder"])
def test_overwrite_refuses_what_is_not_an_artifact(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if name == "folder":
        (out / name).mkdir()
    else:
        (out / name).write_text("{}")
    with pytest.raises(ExportError, match=r"out: exists and is not an artifact, so it is not repl"):
        export_model(checkpoint, out, verify=False, overwrite=True)
    assert (out / name).exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_out_that_is_no_folder_is_refused(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    export_model(checkpoint, target, verify=False)
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(target)
    for overwrite in (False, True):
        with pytest.raises(ExportError, match=r"out: exists"):
            export_model(checkpoint, out, verify=False, overwrite=overwrite)
    assert out.is_symlink() or out.read_text() == "mine"


def test_empty_folder_is_used(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_model(checkpoint, tmp_path / "out", verify=False)
    Artifact.open(tmp_path / "out").close()


def test_second_export_into_the_same_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "graph.onnx").write_text("of the other export")
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(
            ExportError, match=r"out\.partial: another export into .*out is running"
        ):
            export_model(checkpoint, tmp_path / "out", verify=False)
        assert (partial / "graph.onnx").exists()
    finally:
        os.close(lock)
    export_model(checkpoint, tmp_path / "out", verify=False)
    assert not partial.exists()


def test_foreign_partial_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "photos").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"out\.partial: holds a folder, photos, that no export"):
        export_model(checkpoint, tmp_path / "out", verify=False)
    (tmp_path / "two.partial").write_text("mine")
    with pytest.raises(ExportError, match=r"two\.partial: cannot be made a folder"):
        export_model(checkpoint, tmp_path / "two", verify=False)


def test_folder_that_cannot_be_written_is_said(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"writing failed \(.*\)\. Check free space"):
        export_model(checkpoint, tmp_path / "file" / "out", verify=False)
