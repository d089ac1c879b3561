"""Artifacts whose graph was changed afterwards, digests rewritten: what a hostile author can do."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edge_memllm
from edge_memllm.artifact import Artifact
from edge_memllm.errors import ArtifactError
from edge_memllm.manifest import FileSpec, Manifest

Change = Callable[[Any], object]


def seal(folder: Path, manifest: Manifest, *names: str, **parts: Any) -> None:
    """Write the manifest so that it vouches for the files as they are now."""
    files = dict(manifest.files)
    for name in (manifest.graph.file, *names):
        content = (folder / name).read_bytes()
        files[name] = FileSpec(len(content), hashlib.sha256(content).hexdigest())
    changed = dataclasses.replace(manifest, files=files, **parts)
    (folder / "manifest.json").write_bytes(changed.to_json())


def manifest_of(folder: Path) -> Manifest:
    with Artifact.open(folder) as artifact:
        return artifact.manifest


def change_graph(folder: Path, change: Change) -> None:
    import onnx

    manifest = manifest_of(folder)
    path = folder / manifest.graph.file
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    seal(folder, manifest)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        edge_memllm.load(folder, device="cpu", threads=1)
