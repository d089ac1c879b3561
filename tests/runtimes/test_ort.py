"""ONNX Runtime: the device that was asked for, its options, and what can go wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm import load
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.errors import EdgeMemLLMError, RuntimeUnavailableError
from edge_memllm_runtimes import open_runtime, usable_devices
from edge_memllm_runtimes.kv_cache import grown_capacity
from edge_memllm_runtimes.options import RuntimeOptions, physical_cores
from support.checkpoints import MakeArtifact
from support.runtimes import ARTIFACTS


@pytest.fixture(scope="module")
def artifact(make_artifact: MakeArtifact) -> Iterator[Artifact]:
    with Artifact.open(make_artifact(**ARTIFACTS["fp32"])) as opened:
        yield opened


def test_cuda_that_is_not_there_is_refused(artifact: Artifact) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(
        RuntimeUnavailableError,
        match=r"device 'cuda' needs CUDAExecutionProvider, this onnxruntime .* has "
        r".*CPUExecutionProvider.*pip install 'onnxruntime-gpu==\d+\.\d+\.\*'",
    ):
        open_runtime(artifact, "cuda")


def test_auto_takes_the_cpu_and_says_why(
    artifact: Artifact, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with caplog.at_level(logging.INFO):
        assert usable_devices(artifact) == ("cpu",)
    assert "device auto: cpu, because cuda is not usable. device 'cuda' needs" in caplog.text


def test_cuda_needs_half_precision(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: both)
    with pytest.raises(RuntimeUnavailableError, match="computes in float16, this one computes in"):
        open_runtime(artifact, "cuda")


class Elsewhere:
    """A session that silently took the CPU."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


class Broken:
    """A session whose device does not start."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA driver version is insufficient")


@pytest.mark.parametrize(
    ("session", "reason"),
    [
        (Elsewhere, "it took CPUExecutionProvider instead of CUDAExecutionProvider"),
        (Broken, "CUDA driver version is insufficient"),
    ],
)
def test_a_device_that_does_not_work_is_refused_and_auto_goes_on(
    make_artifact: MakeArtifact,
    monkeypatch: pytest.MonkeyPatch,
    session: type,
    reason: str,
) -> None:
    import onnxruntime

    real = onnxruntime.InferenceSession

    def pick(*arguments: Any, providers: Any, **more: Any) -> Any:
        kind = session if providers[0][0].startswith("CUDA") else real
        return kind(*arguments, providers=providers, **more)

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", pick)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda _: None)
    with (
        Artifact.open(make_artifact(**ARTIFACTS["int4"])) as half,
        pytest.raises(RuntimeUnavailableError, match=f"cannot use the device 'cuda': {reason}"),
    ):
        open_runtime(half, "cuda")
    with load(half.path, device="auto", threads=1) as model:
        assert model.device == "cpu"


def test_only_float_weights_are_left_unpacked(make_artifact: MakeArtifact) -> None:
    entry = "session.disable_prepacking"
    with load(make_artifact(**ARTIFACTS["fp32"]), threads=1) as model:
        options = model.runtime._session.get_session_options()  # type: ignore[attr-defined]
        assert options.get_session_config_entry(entry) == "1"
        assert options.intra_op_num_threads == 1
    with load(make_artifact(**ARTIFACTS["int4"])) as model:
        options = model.runtime._session.get_session_options()  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match=entry):
            options.get_session_config_entry(entry)
        assert options.intra_op_num_threads == physical_cores()


def test_a_step_that_fails_is_one_error_and_nothing_on_stderr(
    make_artifact: MakeArtifact, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        load(make_artifact(**ARTIFACTS["fp32"]), threads=1) as model,
        Artifact.open(make_artifact(**ARTIFACTS["int4"])) as other,
    ):
        buffer = RecordBuffer(other.manifest.layout, 1)  # half precision, where single belongs
        cache = model.runtime.new_cache(1)
        with pytest.raises(EdgeMemLLMError, match=r"graph\.onnx: ONNX Runtime failed on cpu in"):
            model.runtime.step(buffer, 1, np.array([[0]]), cache, np.array([[0]]))
        assert cache.lengths.tolist() == [0]
        assert model.generate([1], max_new_tokens=2, ignore_eos=True)
    assert capfd.readouterr() == ("", "")


def test_without_memory_for_the_cache_the_generation_ends_and_the_model_stays(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = np.zeros
    made = []

    def limited(shape: Any, *rest: Any) -> Any:
        if len(made) == 6:
            raise MemoryError("Unable to allocate 1. TiB")
        made.append(shape)
        return zeros(shape, *rest)

    with load(make_artifact(**ARTIFACTS["fp32"]), threads=1) as model:
        expected = model.generate([1] * 300, max_new_tokens=2, ignore_eos=True)
        cache = model.runtime.new_cache(1)
        cache.ensure(10)
        with monkeypatch.context() as patch:
            patch.setattr("edge_memllm_runtimes.ort_cache.np.zeros", limited)
            made.extend([None] * 4)
            with pytest.raises(
                EdgeMemLLMError,
                match=r"no memory for keys and values of 1 x 512 positions \(Unable",
            ):
                cache.ensure(300)
        assert cache.nbytes == 0
        assert model.generate([1] * 300, max_new_tokens=2, ignore_eos=True) == expected


def test_a_closed_runtime_says_so(artifact: Artifact) -> None:
    runtime = open_runtime(artifact, "cpu", RuntimeOptions(threads=1))
    runtime.close()
    runtime.close()
    with pytest.raises(EdgeMemLLMError, match=r"the runtime is closed\. Load the model again"):
        runtime.new_cache(1)


@pytest.mark.parametrize(
    ("needed", "context", "expected"),
    [
        (1, 512, 256),
        (256, 512, 256),
        (257, 512, 512),
        (513, 4096, 768),
        (1025, 4096, 1536),
        (1537, 4096, 2048),
        (2049, 8192, 3072),
        (900, 1000, 1000),
    ],
)
def test_capacity_grows_by_half_a_power_of_two_up_to_the_context(
    needed: int, context: int, expected: int
) -> None:
    assert grown_capacity(needed, context) == expected


@given(needed=st.integers(1, 1 << 20))
def test_capacity_holds_what_is_needed_and_a_third_more_at_most(needed: int) -> None:
    capacity = grown_capacity(needed, 1 << 21)
    assert needed <= capacity < max(257, needed * 1.5 + 256)
    assert grown_capacity(capacity, 1 << 21) == capacity


def test_hardware_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: Any) -> None:
    for processor, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert physical_cores(tmp_path) == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2})
    assert physical_cores(tmp_path) == 1
    assert physical_cores(tmp_path / "not there") == 2
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert physical_cores(tmp_path) == 6
