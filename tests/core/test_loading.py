from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

import edge_memllm
from edge_memllm import RequestError
from edge_memllm.errors import ArtifactError, RuntimeUnavailableError
from edge_memllm.statistics import ProcessMemory
from edge_memllm.table.table import Table
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import VOCABULARY, MakeArtifact
from support.small_model import write_small_artifact


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
        fake = FakeRuntime(VOCABULARY)
        monkeypatch.setattr("edge_memllm_runtimes.open_runtime", lambda *_: fake)
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
        ({"memory_limit": 0}, "memory_limit is 0, expected an integer of at least 1"),
        ({"memory_limit": 2.5e9}, r"memory_limit is 2500000000\.0, expected an integer"),
        ({"vram_limit": "1GB"}, "vram_limit is for CUDA, the device is 'cpu'"),
        ({"vram_limit": "1 cat"}, "vram_limit: '1 cat' is not a size such as"),
        ({"record_cache": -1}, "record_cache is -1, expected bytes, 0 for none"),
        ({"record_cache": True}, "record_cache is True, expected bytes"),
        ({"hot_text": "one"}, r"hot_text says what to keep .* Give record_cache"),
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


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for ONNX Runtime on a CPU; notes the options it was opened with."""
    opened: list[Any] = []

    def open_runtime(artifact: Any, device: str, options: Any) -> FakeRuntime:
        opened.append(options)
        return FakeRuntime(VOCABULARY)

    monkeypatch.setattr("edge_memllm_runtimes.open_runtime", open_runtime)
    return opened


def test_what_was_chosen_reaches_runtime_and_table(
    folder: Path, fake: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    real = Table.open.__func__  # type: ignore[attr-defined]

    def open_table(cls: Any, artifact: Any, reader: str, **options: Any) -> Table:
        asked.update(options, reader=reader)
        return real(cls, artifact, reader, **options)

    monkeypatch.setattr(Table, "open", classmethod(open_table))
    with edge_memllm.load(
        folder,
        reader="pread",
        record_cache=100_000,
        hot_text="abbccc",
        memory_limit=10**9,
        packed_cache=tmp_path / "cache",
    ) as model:
        assert asked == {
            "reader": "pread",
            "record_cache_bytes": 100_000,
            "hot_tokens": model.tokenize("cba"),
            "quality": "full",
        }
        memory = model.describe()["memory"]
    assert fake[0].packed_cache == tmp_path / "cache"
    assert memory["limit_bytes"] == 10**9
    assert memory["kv_limit_bytes"] == fake[0].kv_bytes == 10**9 - memory["estimate_bytes"]
    assert {"what": "record cache", "bytes": 100_000} in memory["estimate"]


@pytest.mark.usefixtures("fake")
def test_a_limit_too_small_is_refused_with_its_arithmetic(folder: Path) -> None:
    with pytest.raises(
        RequestError, match=r"memory_limit is 1,000,000 bytes and about [\d,]+ are needed:\n"
    ):
        edge_memllm.load(folder, memory_limit=1_000_000)


def test_a_text_that_grows_beyond_the_limit_ends_with_what_fits(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = ProcessMemory(anon_bytes=50_000_000)
    monkeypatch.setattr("edge_memllm.loading.process_memory", lambda: held)
    path = make_artifact(graph_weights="int4", table_codec="int8")
    options: dict[str, Any] = {"device": "cpu", "threads": 1, "prefill_chunk": 16}
    with edge_memllm.load(path, **options) as model:
        memory = model.describe()["memory"]
    position = memory["kv_position_bytes"] + memory["score_position_bytes"]
    options["memory_limit"] = memory["estimate_bytes"] + 300 * position
    with edge_memllm.load(path, **options) as model:
        with pytest.raises(RequestError, match="301 positions of one sequence are needed, 300 fit"):
            model.generate([1] * 200, max_new_tokens=150, ignore_eos=True)
        with pytest.raises(RequestError, match="400 positions of one sequence are needed, 300 fit"):
            model.generate([1] * 400, max_new_tokens=1)
        assert model.generate([1] * 200, max_new_tokens=4, ignore_eos=True)


@pytest.mark.parametrize(("grown", "warned"), [(10_000_000, False), (90_000_000, True)])
@pytest.mark.usefixtures("fake")
def test_more_memory_than_estimated_is_a_warning(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    grown: int,
    warned: bool,
) -> None:
    held = iter([50_000_000, 50_000_000 + grown])
    monkeypatch.setattr(
        "edge_memllm.loading.process_memory", lambda: ProcessMemory(anon_bytes=next(held))
    )
    with caplog.at_level(logging.WARNING):
        edge_memllm.load(folder).close()
    assert ("more than the" in caplog.text) == warned


@pytest.mark.usefixtures("fake")
def test_a_system_that_does_not_tell_its_memory_is_no_obstacle(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_memllm.loading.process_memory", ProcessMemory)
    edge_memllm.load(folder, memory_limit=10**9).close()


def test_progress_tells_every_stage_to_its_end(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact()
    told: list[tuple[str, int, int]] = []
    edge_memllm.load(artifact, device="cpu", progress=lambda *now: told.append(now)).close()
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == ["files", "graph", "table"]
    for stage in stages:
        done = [(at, total) for name, at, total in told if name == stage]
        assert done == sorted(done)
        assert done[0][0] == 0
        assert done[-1][0] == done[-1][1] > 0


@pytest.mark.parametrize("stage", ["files", "graph", "table"])
def test_progress_may_end_the_loading(make_artifact: MakeArtifact, stage: str) -> None:
    def give_up(now: str, done: int, total: int) -> None:
        if now == stage and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edge_memllm.load(make_artifact(), device="cpu", progress=give_up)
