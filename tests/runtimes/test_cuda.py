"""CUDA without CUDA: what is asked of the library, and the path of buffers, on a pretended device.

The same on a real one is in test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import EdgeMemLLMError, RequestError, RuntimeUnavailableError
from edge_memllm_runtimes import open_runtime
from edge_memllm_runtimes.options import RuntimeOptions
from support.checkpoints import MakeArtifact
from support.runtimes import ARTIFACTS, LONG, TEXT, in_own_dtype, pretend_cuda

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return pretend_cuda(monkeypatch)


@pytest.fixture
def half(make_artifact: MakeArtifact) -> Path:
    return make_artifact(**ARTIFACTS["int4"])


def logits(path: Path, device: str, ids: list[int], fed: int = 6, **options: Any) -> np.ndarray:
    """Logits of a prompt in chunks and of `fed` decoded tokens after it."""
    with (
        edge_memllm.load(path, device=device, threads=1, **options) as model,
        Feeder(model.runtime, model.table, 1, 16) as feeder,
    ):
        parts = [feeder.prefill(0, ids).copy()]
        parts += [feeder.decode([token])[0].copy() for token in ids[:fed]]
        parts.append(feeder.verify(ids[:3])[-1].copy())
        parts += [feeder.decode([token])[0].copy() for token in ids[:fed]]
    return np.stack(parts)


@pytest.mark.parametrize("form", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda graph"])
def test_its_buffers_give_the_logits_of_the_cpu(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, form: str, graph: bool
) -> None:
    path = make_artifact(**ARTIFACTS[form])
    in_own_dtype(monkeypatch)
    expected = logits(path, "cpu", TEXT)
    pretend_cuda(monkeypatch)
    np.testing.assert_array_equal(logits(path, "cuda", TEXT, cuda_graph=graph), expected)


def test_batches_and_growth_give_the_texts_of_the_cpu(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [LONG[:250], TEXT, TEXT[::-1], [1, 1]]
    in_own_dtype(monkeypatch)
    with edge_memllm.load(half, device="cpu", threads=1) as model:
        expected = model.generate(prompts, max_new_tokens=12, ignore_eos=True)
    pretend_cuda(monkeypatch)
    with edge_memllm.load(half, device="cuda", threads=1, cuda_graph=True) as model:
        assert model.device == "cuda"
        assert model.generate(prompts, max_new_tokens=12, ignore_eos=True) == expected


def test_only_decode_steps_are_recorded_each_capacity_anew(half: Path, cuda: list[str]) -> None:
    with edge_memllm.load(half, device="cuda", threads=1, cuda_graph=True) as model:
        model.generate(LONG[:253], max_new_tokens=8, ignore_eos=True)
        # One prefill; positions 254 to 256 in the first room, 257 to 260 in the next.
        assert cuda == ["-1", "1", "1", "1", "2", "2", "2", "2"]
        cuda.clear()
        model.generate(TEXT, max_new_tokens=4, ignore_eos=True)
        assert cuda == ["-1", "3", "3", "3"]  # another generation, other addresses
    assert "none" not in cuda


def test_drafts_are_not_recorded_and_void_what_was(half: Path, cuda: list[str]) -> None:
    with (
        edge_memllm.load(half, device="cuda", threads=1, cuda_graph=True) as model,
        Feeder(model.runtime, model.table, 1, 64) as feeder,
    ):
        feeder.prefill(0, TEXT)
        feeder.decode([1])
        feeder.verify([1, 2, 3])  # allocates: the recording's memory may have gone there
        feeder.decode([1])
        feeder.decode([2])
    assert cuda == ["-1", "1", "-1", "2", "2"]


@pytest.mark.usefixtures("cuda")
def test_recordings_that_are_void_are_released(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    monkeypatch.setattr(
        onnxruntime.InferenceSession,
        "release_captured_graph",
        lambda _, number: released.append(number),
    )
    with edge_memllm.load(half, device="cuda", threads=1, cuda_graph=True) as model:
        for _ in range(3):
            model.generate(TEXT, max_new_tokens=3, ignore_eos=True)
    assert released == [1, 2]


def test_without_a_cuda_graph_no_run_options_are_given(half: Path, cuda: list[str]) -> None:
    with edge_memllm.load(half, device="cuda", threads=1) as model:
        model.generate(TEXT, max_new_tokens=3, ignore_eos=True)
    assert set(cuda) == {"none"}


def test_a_limit_of_its_memory_is_refused_or_kept(half: Path, cuda: list[str]) -> None:
    with pytest.raises(RequestError, match=r"vram_limit is 1,000 bytes and about .* are needed:\n"):
        edge_memllm.load(half, device="cuda", vram_limit=1000)
    with edge_memllm.load(half, device="cuda", threads=1, prefill_chunk=16) as model:
        memory = model.describe()["memory"]
    position = memory["kv_position_bytes"]
    limit = memory["device_estimate_bytes"] + 2 * 300 * position
    with edge_memllm.load(
        half, device="cuda", threads=1, prefill_chunk=16, vram_limit=limit
    ) as model:
        assert model.describe()["memory"]["device_limit_bytes"] == limit
        model.generate(LONG[:299], max_new_tokens=2, ignore_eos=True)
        with pytest.raises(RequestError, match="301 positions of one sequence are needed, 300 fit"):
            model.generate(LONG[:299], max_new_tokens=4, ignore_eos=True)


class AskedError(Exception):
    """Carries what a session was asked for."""


def asked(artifact: Artifact, patch: pytest.MonkeyPatch, options: RuntimeOptions) -> Any:
    """What the library would be asked for to open a session on CUDA."""

    def session(path: str, settings: Any, **more: Any) -> Any:
        raise AskedError(path, settings, more)

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    patch.setattr(onnxruntime, "get_available_providers", lambda: both)
    patch.setattr(onnxruntime, "InferenceSession", session)
    patch.setattr(onnxruntime, "set_default_logger_severity", lambda _: None)
    with pytest.raises(RuntimeUnavailableError) as caught:
        open_runtime(artifact, "cuda", options)
    assert isinstance(caught.value.__cause__, AskedError)
    return caught.value.__cause__.args


@pytest.fixture
def opened(half: Path) -> Iterator[Artifact]:
    with Artifact.open(half) as artifact:
        yield artifact


def test_what_the_library_is_asked_for(opened: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RuntimeOptions(arena_bytes=123_456, cuda_graph=True)
    _, settings, more = asked(opened, monkeypatch, options)
    assert more["enable_fallback"] is False
    ((provider, chosen),) = more["providers"]
    assert provider == "CUDAExecutionProvider"
    assert chosen == {
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": "123456",
        "enable_cuda_graph": "1",
    }
    assert settings.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_what_was_not_asked_for_stays_the_library_s_own(
    opened: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, more = asked(opened, monkeypatch, RuntimeOptions())
    assert more["providers"][0][1] == {"arena_extend_strategy": "kSameAsRequested"}


@pytest.mark.parametrize(
    "reason",
    [
        "graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been",
        "as requested by the user as all compute graph nodes have not been partitioned to the",
    ],
)
def test_nodes_that_would_run_on_the_cpu_are_an_error_that_says_so(
    opened: Artifact, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def session(*_: Any, **__: Any) -> Any:
        raise RuntimeError(reason)

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda _: None)
    with pytest.raises(
        RuntimeUnavailableError, match="has no 'cuda' form of some nodes of this graph"
    ):
        open_runtime(opened, "cuda")


def test_the_library_refuses_a_node_on_the_cpu_with_the_words_we_look_for(
    opened: Artifact, tmp_path: Path
) -> None:
    """The CPU provider named for itself is refused in the library's own words: they are known."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    graph = opened.path / opened.manifest.graph.file
    with pytest.raises(Exception, match="fallback to the CPU EP"):
        onnxruntime.InferenceSession(
            str(graph), settings, providers=["CPUExecutionProvider"], enable_fallback=False
        )


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cuda_graph": True}, r"cuda_graph is for CUDA, the device is 'cpu'\. Leave it out"),
        ({"vram_limit": 10**9}, r"vram_limit is for CUDA, the device is 'cpu'\. Leave it out"),
    ],
)
def test_options_of_cuda_are_refused_elsewhere(
    half: Path, monkeypatch: pytest.MonkeyPatch, device: str, option: Any, message: str
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RequestError, match=message):
        edge_memllm.load(half, device=device, **option)


def test_the_runtime_itself_refuses_what_a_device_does_not_have(opened: Artifact) -> None:
    for options in (RuntimeOptions(cuda_graph=True), RuntimeOptions(arena_bytes=1)):
        with pytest.raises(RequestError, match="is for CUDA, the device is 'cpu'"):
            open_runtime(opened, "cpu", options)


def test_the_packed_cache_is_for_a_cpu(half: Path, tmp_path: Path, cuda: list[str]) -> None:
    with pytest.raises(RequestError, match="packed_cache is for a CPU, the device is 'cuda'"):
        edge_memllm.load(half, device="cuda", packed_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_step_that_fails_is_one_error(
    half: Path, cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with edge_memllm.load(half, device="cuda", threads=1, cuda_graph=True) as model:

        def out_of_memory(*_: Any) -> None:
            raise RuntimeError("CUDA failure 2: out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", out_of_memory)
            with pytest.raises(
                EdgeMemLLMError, match="ONNX Runtime failed on cuda in this step: CUDA failure 2"
            ):
                model.generate(TEXT, max_new_tokens=2)
        assert model.generate(TEXT, max_new_tokens=2, ignore_eos=True)  # its turn was given back


def test_a_session_is_saved_and_restored(half: Path, tmp_path: Path, cuda: list[str]) -> None:
    with edge_memllm.load(half, device="cuda", threads=1, cuda_graph=True) as model:
        first = model.session(seed=1)
        first.append(TEXT)
        first.generate(max_new_tokens=9, ignore_eos=True)
        first.save(tmp_path / "a")
        again = model.restore_session(tmp_path / "a")
        for session in (first, again):
            session.generate(max_new_tokens=9, ignore_eos=True)
        assert again.tokens == first.tokens
