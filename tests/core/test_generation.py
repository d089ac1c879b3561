from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder, StepCosts
from edge_memllm.engine.generation import TokenSequence
from edge_memllm.errors import CorruptionError
from edge_memllm.sampling import Sampler, Sampling
from edge_memllm.table.table import Table
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import EOS, VOCABULARY
from support.generation import tokens_of
from support.small_model import CONTEXT, ScriptedRuntime, write_small_artifact

PROMPTS = [[5, 6, 7, 5, 5], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    made = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a")
    with Artifact.open(made.path) as artifact:
        opened = Table.open(artifact, "pread")
        yield opened
        opened.close()


class KeepingRuntime(FakeRuntime):
    """Keeps the caches it made, and what the steps were."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, CONTEXT)
        self.caches: list[Any] = []
        self.steps: list[tuple[int, int, int, int]] = []  # tokens, distinct, wanted, sequence

    def new_cache(self, batch: int) -> Any:
        self.caches.append(super().new_cache(batch))
        return self.caches[-1]

    def step(self, buffer: Any, distinct: int, index: Any, cache: Any, wanted: Any, **more: Any):
        sequence = more.get("sequence")
        self.steps.append((index.size, distinct, wanted.shape[1], sequence))
        return super().step(buffer, distinct, index, cache, wanted, **more)


def sequence(prompt: list[int], limit: int = 12, **options: Any) -> TokenSequence:
    ends = frozenset(options.pop("ends", ()))
    return TokenSequence(prompt, Sampler(Sampling(**options), 3), limit, ends)


def run(table: Table, one: TokenSequence, **options: Any) -> list[int]:
    list(tokens_of(FakeRuntime(VOCABULARY, CONTEXT), table, one, **options))
    return one.tokens


@settings(max_examples=20, deadline=None)
@given(prompt=st.lists(st.integers(0, 299), min_size=1, max_size=40), chunk=st.integers(1, 45))
def test_the_size_of_prefill_chunks_changes_nothing(
    table: Table, prompt: list[int], chunk: int
) -> None:
    whole = run(table, sequence(prompt, 3))
    assert run(table, sequence(prompt, 3), prefill_chunk=chunk) == whole


def test_only_distinct_tokens_are_read_and_only_the_last_logits_computed(table: Table) -> None:
    runtime, costs = KeepingRuntime(), StepCosts()
    before = table.statistics.records_read
    one = sequence([5, 5, 6, 5, 7], 3)
    list(tokens_of(runtime, table, one, prefill_chunk=4, costs=costs))
    assert runtime.steps == [(4, 2, 0, 0), (1, 1, 1, 0), (1, 1, 1, None), (1, 1, 1, None)]
    assert costs.records_read == sum(distinct for _, distinct, _, _ in runtime.steps)
    assert table.statistics.records_read - before == costs.records_read
    assert (costs.prefill_tokens, costs.decode_tokens) == (5, 2)
    assert costs.prefill_seconds > 0
    assert costs.decode_seconds > 0
    assert costs.kv_bytes > 0


def test_an_end_token_ends_a_sequence(table: Table) -> None:
    free = run(table, sequence(PROMPTS[0]))
    end = free[4]
    ended = sequence(PROMPTS[0], ends=[end])
    assert run(table, ended) == free[: free.index(end) + 1]
    assert ended.finish_reason == "stop"


def test_a_sequence_can_be_stopped_from_outside(table: Table) -> None:
    one = sequence(PROMPTS[0])
    for token in tokens_of(FakeRuntime(VOCABULARY, CONTEXT), table, one):
        assert token == one.tokens[-1]
        if len(one.tokens) == 3:
            one.stop()
    assert len(one.tokens) == 3
    assert one.finish_reason == "stop"


def test_closing_frees_the_cache_at_once(table: Table) -> None:
    runtime = KeepingRuntime()
    tokens = tokens_of(runtime, table, sequence(PROMPTS[0]))
    next(tokens)
    assert not runtime.caches[0].closed
    tokens.close()
    assert runtime.caches[0].closed


def test_an_error_frees_the_cache(tmp_path: Path) -> None:
    made = write_small_artifact(tmp_path / "a")
    with Artifact.open(made.path) as artifact:
        damaged = Table.open(artifact, "pread")
        data = bytearray(made.table.read_bytes())
        data[made.manifest.table.records_offset + 9 * made.manifest.table.stride] ^= 1
        made.table.write_bytes(data)
        runtime = KeepingRuntime()
        with pytest.raises(CorruptionError, match="the record of token 9 "):
            list(tokens_of(runtime, damaged, sequence([9])))
        assert runtime.caches[0].closed
        damaged.close()


def test_an_interrupt_frees_the_cache(table: Table) -> None:
    class Interrupted(KeepingRuntime):
        def step(self, *arguments: Any, **more: Any) -> Any:
            if len(self.steps) == 2:
                raise KeyboardInterrupt
            return super().step(*arguments, **more)

    runtime = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        list(tokens_of(runtime, table, sequence(PROMPTS[0])))
    assert runtime.caches[0].closed


def test_scores_are_the_logits_of_every_position(table: Table) -> None:
    runtime = FakeRuntime(VOCABULARY, CONTEXT)
    ids = PROMPTS[2]
    with Feeder(runtime, table, 1, 64) as feeder:
        scores = feeder.score(0, ids)
    for end in range(1, len(ids) + 1):
        with Feeder(runtime, table, 1, 64) as feeder:
            np.testing.assert_array_equal(feeder.prefill(0, ids[:end]), scores[end - 1])


def test_skipping_and_rewinding_keep_the_history(table: Table) -> None:
    runtime = FakeRuntime(VOCABULARY, CONTEXT)
    with Feeder(runtime, table, 1, 4) as feeder:
        expected = feeder.prefill(0, [1, 2, 3, 4, 5, 6]).copy()
        feeder.cache.truncate(0, 2)
        feeder.skip(0, [3, 4, 5])
        np.testing.assert_array_equal(feeder.prefill(0, [6]), expected)
        feeder.cache.truncate(0, 0)
        feeder.skip(0, [1, 2, 3, 4, 5])
        np.testing.assert_array_equal(feeder.decode([6])[0], expected)


def test_a_script_is_followed(table: Table) -> None:
    scripted = sequence([1], ends=[EOS])
    list(tokens_of(ScriptedRuntime([3, 4, EOS, 5]), table, scripted))
    assert scripted.tokens == [3, 4, EOS]
