from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import VOCABULARY
from small_model import write_small_artifact

import edge_memllm
from edge_memllm import RequestError
from edge_memllm.errors import ArtifactError, RuntimeUnavailableError
from edge_memllm_runtimes.fake import FakeRuntime


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("model") / "artifact").path


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors on Linux")
@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        ("tokenizer.json", ArtifactError, "not a tokenizer"),
        ("graph.onnx", ArtifactError, "graph.onnx: not an ONNX graph"),
    ],
)
def test_a_failed_load_leaves_nothing_open(
    tmp_path: Path, broken: str, error: type[Exception], message: str, monkeypatch: Any
) -> None:
    made = write_small_artifact(tmp_path / "a", **{broken.replace(".", "__"): b"{}"})
    if broken != "graph.onnx":
        monkeypatch.setattr("edge_memllm_runtimes.open_runtime", lambda *_: FakeRuntime(VOCABULARY))
    pytest.importorskip("onnxruntime")  # opens descriptors of its own, once
    before = open_descriptors()
    with pytest.raises(error, match=message):
        edge_memllm.load(made.path)
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu', expected one of auto, cpu, cuda"),
        ({"reader": "tape"}, "Unknown reader 'tape'"),
        ({"threads": 0}, "threads is 0, expected an integer of at least 1"),
        ({"threads": True}, "threads is True"),
        ({"threads": 1.5}, r"threads is 1\.5"),
    ],
)
def test_an_option_that_does_not_exist_is_refused(
    folder: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        edge_memllm.load(folder, **option)


def test_a_missing_runtime_library_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(
        RuntimeUnavailableError, match=r"'onnxruntime', which cannot be imported .*pip install"
    ):
        edge_memllm.load(folder, device="cpu")
