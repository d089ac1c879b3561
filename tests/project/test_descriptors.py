"""Descriptors: none stays open, whether a model is closed, fails to load or is forgotten."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm import Model
from edge_memllm.errors import EdgeMemLLMError
from support.checkpoints import MakeArtifact

_OPEN = Path("/proc/self/fd")
if not _OPEN.exists():
    pytest.skip("this system does not tell what is open", allow_module_level=True)


def count_open() -> int:
    gc.collect()
    return len(os.listdir(_OPEN))


def load(folder: Path, reader: str) -> Model:
    try:
        return edge_memllm.load(folder, device="cpu", threads=1, reader=reader)
    except EdgeMemLLMError:
        pytest.skip(f"no reader {reader} here")


@pytest.mark.parametrize("reader", ["pread", "direct", "uring", "mmap", "ram"])
def test_models_that_are_closed_or_forgotten_leave_none(
    reader: str, make_artifact: MakeArtifact
) -> None:
    folder = make_artifact(graph_weights="fp32")
    load(folder, reader).close()
    before = count_open()
    for number in range(20):
        model = load(folder, reader)
        model.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True)
        with model.session() as session:
            session.append([1, 2])
            session.prefill()
        if number % 2:
            model.close()
        del model, session
    assert count_open() == before


@pytest.mark.parametrize("file", ["manifest.json", "graph.onnx", "table.safetensors"])
def test_what_cannot_be_loaded_leaves_none(
    file: str, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_artifact(graph_weights="fp32"), tmp_path / "artifact"))
    os.truncate(folder / file, (folder / file).stat().st_size - 1)
    before = count_open()
    for _ in range(20):
        with pytest.raises(EdgeMemLLMError):
            edge_memllm.load(folder, device="cpu", threads=1)
    assert count_open() == before
