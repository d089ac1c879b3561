"""What only a CUDA device can show. `make gpu` runs these, and the benchmark after them.

The contract of a runtime on CUDA is in test_runtime.py, with the same marker.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edge_memllm
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import RequestError, RuntimeUnavailableError
from support.checkpoints import MakeArtifact
from support.runtimes import ARTIFACTS, LONG, TEXT, in_effect

pytestmark = pytest.mark.gpu
# What the driver and its libraries take in a process besides the arena; generous.
_CONTEXT_BYTES = 1 << 30


@pytest.fixture(params=["int4", "int8", "fp16"])
def artifact(request: pytest.FixtureRequest, make_artifact: MakeArtifact) -> Iterator[Path]:
    path = make_artifact(**ARTIFACTS[request.param])
    try:
        edge_memllm.load(path, device="cuda").close()
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))
    return path


def logits(path: Path, device: str, ids: list[int], **options: object) -> np.ndarray:
    with (
        edge_memllm.load(path, device=device, **options) as model,  # type: ignore[arg-type]
        Feeder(model.runtime, model.table, 1, 64) as feeder,
    ):
        parts = [feeder.prefill(0, ids).copy()]
        parts += [feeder.decode([token])[0].copy() for token in ids[:20]]
    return np.stack(parts)


def test_tokens_are_those_of_the_cpu(artifact: Path) -> None:
    # Rows dequantised with another zero point than the CPU's would show here at once.
    in_effect(logits(artifact, "cuda", LONG), logits(artifact, "cpu", LONG))
    texts = {}
    for device in ("cpu", "cuda"):
        with edge_memllm.load(artifact, device=device) as model:
            texts[device] = model.generate(TEXT, max_new_tokens=16, ignore_eos=True)
    assert texts["cuda"] == texts["cpu"]


def test_a_recorded_step_gives_what_a_plain_one_gives(artifact: Path) -> None:
    plain = logits(artifact, "cuda", LONG)
    recorded = logits(artifact, "cuda", LONG, cuda_graph=True)
    in_effect(recorded, plain)
    np.testing.assert_array_equal(recorded.argmax(axis=-1), plain.argmax(axis=-1))


def test_recordings_survive_growth_batches_and_each_other(artifact: Path) -> None:
    prompts = [LONG[:250], TEXT, [1, 2]]
    with edge_memllm.load(artifact, device="cuda") as model:
        expected = model.generate(prompts, max_new_tokens=24, ignore_eos=True)
        one = model.generate(TEXT, max_new_tokens=24, ignore_eos=True)
    with edge_memllm.load(artifact, device="cuda", cuda_graph=True) as model:
        assert model.generate(prompts, max_new_tokens=24, ignore_eos=True) == expected
        # Two generations at once, step by step: neither may replay what the other has overwritten.
        streams = [model.stream(TEXT, max_new_tokens=24, ignore_eos=True) for _ in range(2)]
        texts = ["", ""]
        for pieces in zip(*streams, strict=True):
            texts = [text + piece.text for text, piece in zip(texts, pieces, strict=True)]
        assert texts == [one, one]


def test_no_node_is_left_to_the_cpu(artifact: Path) -> None:
    with edge_memllm.load(artifact, device="cuda") as model:
        settings = model.runtime._session.get_session_options()  # type: ignore[attr-defined]
        assert settings.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def used_bytes() -> int:
    """Memory in use on the first device, by everybody."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) << 20


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="asks nvidia-smi")
def test_the_limit_of_its_memory_is_kept(artifact: Path) -> None:
    before = used_bytes()
    limit = 400_000_000
    with edge_memllm.load(artifact, device="cuda", vram_limit=limit, prefill_chunk=64) as model:
        model.generate([LONG, LONG, TEXT], max_new_tokens=8, ignore_eos=True)
        assert used_bytes() - before <= limit + _CONTEXT_BYTES
    with pytest.raises(RequestError, match="vram_limit is 1,000,000 bytes and about"):
        edge_memllm.load(artifact, device="cuda", vram_limit=1_000_000)


def test_a_saved_session_goes_on_as_it_would_have(artifact: Path, tmp_path: Path) -> None:
    with edge_memllm.load(artifact, device="cuda") as model:
        first = model.session(seed=1)
        first.append(TEXT)
        first.generate(max_new_tokens=9, ignore_eos=True)
        first.save(tmp_path / "a")
        again = model.restore_session(tmp_path / "a")
        for session in (first, again):
            session.generate(max_new_tokens=9, ignore_eos=True)
        assert again.tokens == first.tokens
