from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import CorruptionError
from edge_memllm.feeding import Feeder
from edge_memllm.generation import TokenSequence, generate_tokens
from edge_memllm.sampling import Sampler, Sampling
from edge_memllm.statistics import StepCosts
from edge_memllm.table.table import Table
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import EOS, VOCABULARY
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
    stream = options.pop("stream", 0)
    ends = frozenset(options.pop("ends", ()))
    return TokenSequence(prompt, Sampler(Sampling(**options), 3, stream), limit, ends)


def run(table: Table, sequences: list[TokenSequence], **options: Any) -> list[list[int]]:
    list(generate_tokens(FakeRuntime(VOCABULARY, CONTEXT), table, sequences, **options))
    return [each.tokens for each in sequences]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "repetition_penalty": 1.3}])
def test_a_batch_gives_what_each_sequence_gives_alone(table: Table, sampling: Any) -> None:
    alone = [
        run(table, [sequence(prompt, 4 + 5 * n, stream=n, **sampling)])[0]
        for n, prompt in enumerate(PROMPTS)
    ]
    together = [
        sequence(prompt, 4 + 5 * n, stream=n, **sampling) for n, prompt in enumerate(PROMPTS)
    ]
    assert run(table, together) == alone
    assert [len(tokens) for tokens in alone] == [4, 9, 14]


@settings(max_examples=20, deadline=None)
@given(prompt=st.lists(st.integers(0, 299), min_size=1, max_size=40), chunk=st.integers(1, 45))
def test_the_size_of_prefill_chunks_changes_nothing(
    table: Table, prompt: list[int], chunk: int
) -> None:
    whole = run(table, [sequence(prompt, 3)])
    assert run(table, [sequence(prompt, 3)], prefill_chunk=chunk) == whole


def test_only_distinct_tokens_are_read_and_only_the_last_logits_computed(table: Table) -> None:
    runtime, costs = KeepingRuntime(), StepCosts()
    before = table.statistics.records_read
    batch = [sequence([5, 5, 6, 5, 7], 3), sequence([8], 3)]
    list(generate_tokens(runtime, table, batch, prefill_chunk=4, costs=costs))
    same = batch[0].tokens[0] == batch[1].tokens[0], batch[0].tokens[1] == batch[1].tokens[1]
    assert runtime.steps[:3] == [(4, 2, 0, 0), (1, 1, 1, 0), (1, 1, 1, 1)]
    assert runtime.steps[3:] == [(2, 2 - same[0], 1, None), (2, 2 - same[1], 1, None)]
    assert costs.records_read == sum(distinct for _, distinct, _, _ in runtime.steps)
    assert table.statistics.records_read - before == costs.records_read
    assert (costs.prefill_tokens, costs.decode_tokens) == (6, 4)
    assert costs.prefill_seconds > 0
    assert costs.decode_seconds > 0
    assert costs.kv_bytes > 0


def test_equal_tokens_of_a_step_are_read_once(table: Table) -> None:
    runtime = KeepingRuntime()
    list(generate_tokens(runtime, table, [sequence([5], 3), sequence([5], 3)]))
    assert [distinct for _, distinct, _, _ in runtime.steps[2:]] == [1, 1]


def test_an_end_token_ends_one_sequence_and_the_others_go_on(table: Table) -> None:
    free = run(table, [sequence(PROMPTS[0])])[0]
    end = free[4]
    batch = [sequence(PROMPTS[0], ends=[end]), sequence(PROMPTS[1])]
    tokens = run(table, batch)
    assert tokens == [free[: free.index(end) + 1], run(table, [sequence(PROMPTS[1])])[0]]
    assert [each.finish_reason for each in batch] == ["stop", "length"]


def test_a_sequence_can_be_stopped_from_outside(table: Table) -> None:
    batch = [sequence(PROMPTS[0]), sequence(PROMPTS[1])]
    for number in generate_tokens(FakeRuntime(VOCABULARY, CONTEXT), table, batch):
        if number == 0 and len(batch[0].tokens) == 3:
            batch[0].stop()
    assert [len(each.tokens) for each in batch] == [3, 12]
    assert batch[0].finish_reason == "stop"


def test_a_full_sequence_leaves_the_others_room(table: Table) -> None:
    """The first fills the context with its prompt; the second still runs to the end of it."""
    batch = [sequence([4] * CONTEXT, 1), sequence([9], CONTEXT)]
    tokens = run(table, batch)
    assert [len(each) for each in tokens] == [1, CONTEXT]
    assert tokens[1] == run(table, [sequence([9], CONTEXT)])[0]


def test_closing_frees_the_cache_at_once(table: Table) -> None:
    runtime = KeepingRuntime()
    tokens = generate_tokens(runtime, table, [sequence(PROMPTS[0])])
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
            list(generate_tokens(runtime, damaged, [sequence([9])]))
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
        list(generate_tokens(runtime, table, [sequence(PROMPTS[0])]))
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
    list(generate_tokens(ScriptedRuntime([3, 4, EOS, 5]), table, [scripted]))
    assert scripted.tokens == [3, 4, EOS]
