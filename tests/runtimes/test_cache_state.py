"""What a sequence holds can be taken out of one cache and put into another, for every runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from edge_memllm import RequestError
from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.table import Table
from edge_memllm_runtimes import open_runtime
from edge_memllm_runtimes.fake import FakeRuntime
from edge_memllm_runtimes.options import RuntimeOptions
from support.checkpoints import CONTEXT, VOCABULARY, MakeArtifact, MakeCheckpoint
from support.runtimes import ARTIFACTS, TEXT, torch_reference

FORMS = {**{name: ARTIFACTS[name] for name in ("fp32", "fp16", "int4")}, "int8 kv": {}}


@pytest.fixture(scope="module", params=["fake", "torch", *FORMS])
def parts(
    request: pytest.FixtureRequest, make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> Iterator[tuple[Runtime, Table]]:
    name = request.param
    form = {"kv_dtype": "int8"} if name == "int8 kv" else FORMS.get(name, FORMS["fp32"])
    with (
        Artifact.open(make_artifact(**form)) as artifact,
        closing(Table.open(artifact, "ram")) as table,
    ):
        if name == "fake":
            yield FakeRuntime(VOCABULARY, CONTEXT), table
        elif name == "torch":
            yield torch_reference(make_checkpoint()), table
        else:
            with closing(open_runtime(artifact, "cpu", RuntimeOptions(threads=1))) as runtime:
                yield runtime, table


def feeder(parts: tuple[Runtime, Table], batch: int = 1) -> Feeder:
    return Feeder(*parts, batch, 16)


def logits_after(feeder: Feeder, sequence: int, tokens: list[int]) -> np.ndarray:
    return feeder.prefill(sequence, tokens).copy()


def test_what_is_held_goes_on_elsewhere_bit_for_bit(parts: tuple[Runtime, Table]) -> None:
    with feeder(parts) as first, feeder(parts, 2) as second:
        first.skip(0, TEXT)
        second.skip(0, TEXT[:7])
        second.skip(1, TEXT[::-1])
        held = first.cache.state(0)
        assert {name: (a.dtype, a.shape) for name, a in held.items()} == first.cache.state_layout(
            len(TEXT)
        )
        second.cache.load_state(1, len(TEXT), held)
        assert second.cache.lengths.tolist() == [7, len(TEXT)]
        for name, array in second.cache.state(1).items():
            np.testing.assert_array_equal(array, held[name])
        expected = logits_after(first, 0, [65, 66])
        np.testing.assert_array_equal(logits_after(second, 1, [65, 66]), expected)
    with feeder(parts, 2) as again:  # the neighbour was not touched
        again.skip(0, TEXT[:7])
        expected = logits_after(again, 0, [65])
    with feeder(parts, 2) as second:
        second.skip(0, TEXT[:7])
        second.cache.load_state(1, 0, second.cache.state(1))
        np.testing.assert_array_equal(logits_after(second, 0, [65]), expected)


def test_an_empty_sequence_holds_nothing(parts: tuple[Runtime, Table]) -> None:
    with feeder(parts) as one:
        held = one.cache.state(0)
        assert {name: (a.dtype, a.shape) for name, a in held.items()} == one.cache.state_layout(0)
        assert all(array.size == 0 for array in held.values())


def test_what_does_not_fit_is_refused(parts: tuple[Runtime, Table]) -> None:
    with feeder(parts) as one:
        one.skip(0, TEXT)
        held = one.cache.state(0)
        for wrong in ({}, {**held, "more": np.zeros(3)}):
            with pytest.raises(ValueError, match="positions of another cache, expected"):
                one.cache.load_state(0, len(TEXT), wrong)
        with pytest.raises(ValueError, match="3 positions of another cache"):
            one.cache.load_state(0, 3, held)
        assert one.cache.lengths.tolist() == [len(TEXT)]
        one.cache.close()
        with pytest.raises(ValueError, match="the cache is closed"):
            one.cache.load_state(0, len(TEXT), held)


def test_more_than_the_context_is_refused() -> None:
    cache = FakeRuntime(VOCABULARY, 8).new_cache(1)
    with pytest.raises(RequestError, match="9 positions are needed and the model's context has 8"):
        cache.load_state(0, 9, {"states": np.zeros(9, np.uint64)})
