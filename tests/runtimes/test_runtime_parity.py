"""Runtimes against each other: the judge, ONNX Runtime, and gains that a step may change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_memllm import load
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.engine.feeding import Feeder
from edge_memllm.runtime_protocol import Runtime
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import LAYERS, VOCABULARY, MakeArtifact, MakeCheckpoint
from support.runtimes import ARTIFACTS, LONG, TEXT, closely, torch_reference


@pytest.mark.parametrize("form", ["fp32", "fp32 flex grouped", "fp32 dense"])
def test_onnx_runtime_computes_what_torch_computes(
    form: str, make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    fields = {k: v for k, v in ARTIFACTS[form].items() if k not in ("graph_weights", "table_codec")}
    judge = torch_reference(make_checkpoint(**fields))
    with load(make_artifact(**ARTIFACTS[form]), threads=1) as model:

        def logits(runtime: Runtime) -> np.ndarray:
            with Feeder(runtime, model.table, 2, 16) as feeder:
                rows = [feeder.prefill(0, TEXT).copy(), feeder.prefill(1, LONG[:30]).copy()]
                rows += [row.copy() for n in range(8) for row in feeder.decode([n, 2 * n])]
            return np.array(rows)

        closely(logits(model.runtime), logits(judge))


def test_gains_of_a_step_replace_those_of_the_artifact(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    gain = np.array([0.5, 0.0], np.float32)
    assert len(gain) == LAYERS
    judge = torch_reference(make_checkpoint(), memory_gain=gain.tolist())
    with load(make_artifact(**ARTIFACTS["fp32"]), threads=1) as model:
        buffer = RecordBuffer(model.table.layout, 3)
        model.table.fetch(np.array([1, 2, 3]), buffer)
        index, wanted = np.array([[0, 1, 2, 1]]), np.array([[3]])

        def logits(runtime: Runtime, **gains: Any) -> np.ndarray:
            cache = runtime.new_cache(1)
            return runtime.step(buffer, 3, index, cache, wanted, **gains).copy()

        changed = logits(model.runtime, memory_gain=gain)
        closely(changed, logits(judge))
        assert np.abs(changed - logits(model.runtime)).max() > 0.1
        judge = torch_reference(make_checkpoint())
        closely(changed, logits(judge, memory_gain=gain))
        closely(logits(model.runtime), logits(judge))


def test_gains_of_a_step_do_not_stay(make_artifact: MakeArtifact) -> None:
    with load(make_artifact(**ARTIFACTS["fp32"]), threads=1) as model:
        buffer = RecordBuffer(model.table.layout, 1)
        model.table.fetch(np.array([1]), buffer)
        first, cache = np.array([[0]]), model.runtime.new_cache(1)

        def logits(gain: np.ndarray | None) -> np.ndarray:
            cache.truncate(0, 0)
            return model.runtime.step(buffer, 1, first, cache, first, memory_gain=gain).copy()

        before, changed = logits(None), logits(np.zeros(LAYERS, np.float32))
        assert np.abs(changed - before).max() > 0.1
        np.testing.assert_array_equal(logits(None), before)


def test_the_fake_tells_gains_apart(make_artifact: MakeArtifact) -> None:
    with load(make_artifact(**ARTIFACTS["fp32"]), threads=1) as model:
        fake, buffer = FakeRuntime(VOCABULARY), RecordBuffer(model.table.layout, 1)
        one, two = (
            fake.step(buffer, 1, np.array([[0]]), fake.new_cache(1), np.array([[0]]), memory_gain=g)
            for g in (None, np.zeros(LAYERS, np.float32))
        )
        assert not np.array_equal(one, two)
        fake.close()
