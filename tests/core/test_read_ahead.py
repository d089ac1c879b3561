"""Reading the next chunk of a prompt while the present one computes, and how that can end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import ChunkReader, Feeder, StepCosts, number_distinct
from edge_memllm.engine.generation import TokenSequence
from edge_memllm.errors import CorruptionError, StorageError
from edge_memllm.sampling import Sampler, Sampling
from edge_memllm.table.table import Table
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import VOCABULARY
from support.generation import tokens_of
from support.small_model import CONTEXT, open_small_model, write_small_artifact

PROMPT = list(range(40))
SECONDS = 20  # far longer than anything here takes


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    made = write_small_artifact(tmp_path / "a")
    with Artifact.open(made.path) as artifact:
        opened = Table.open(artifact, "pread")
        yield opened
        opened.close()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not helpers()


def helpers() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("edge-memllm-records")]


class Watched(FakeRuntime):
    """Calls `during` in each step with its number, and notes the buffers it was given."""

    def __init__(self, during: Callable[[int], None] = lambda _: None) -> None:
        super().__init__(VOCABULARY, CONTEXT)
        self.during = during
        self.steps = 0
        self.buffers: list[Any] = []
        self.caches: list[Any] = []

    def new_cache(self, batch: int) -> Any:
        self.caches.append(super().new_cache(batch))
        return self.caches[-1]

    def step(self, buffer: Any, *rest: Any, **more: Any) -> Any:
        self.steps += 1
        self.buffers.append(buffer)
        self.during(self.steps)
        return super().step(buffer, *rest, **more)


def watch_fetches(table: Table, before: Callable[[int], None]) -> list[str]:
    """Call `before` with the number of each fetch; return the list of the fetching threads."""
    fetch, threads = table.fetch, []

    def watched(*arguments: Any) -> int:
        threads.append(threading.current_thread().name)
        before(len(threads))
        return fetch(*arguments)

    table.fetch = watched  # type: ignore[method-assign]
    return threads


def sequence(prompt: list[int], limit: int = 1) -> TokenSequence:
    return TokenSequence(prompt, Sampler(Sampling(), 3), limit)


@settings(max_examples=30, deadline=None)
@given(prompt=st.lists(st.integers(0, 299), min_size=1, max_size=60), chunk=st.integers(1, 20))
def test_logits_are_those_of_reading_and_computing_in_turn(
    tmp_path_factory: pytest.TempPathFactory, prompt: list[int], chunk: int
) -> None:
    made = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a")
    with Artifact.open(made.path) as artifact:
        table = Table.open(artifact, "pread")
        runtime = FakeRuntime(VOCABULARY, CONTEXT)
        with Feeder(runtime, table, 1, chunk) as one, Feeder(runtime, table, 1, chunk) as other:
            overlapped = one.prefill(0, prompt)
            parts = [prompt[begin : begin + chunk] for begin in range(0, len(prompt), chunk)]
            for part in parts:
                logits = other.prefill(0, part)  # a single chunk is never overlapped
            np.testing.assert_array_equal(overlapped, logits)
            assert one.costs.records_read == other.costs.records_read
            assert one.costs.reads == other.costs.reads
        table.close()


def test_the_next_chunk_is_read_while_one_computes(table: Table) -> None:
    asked = [threading.Event() for _ in range(5)]
    computing = [threading.Event() for _ in range(5)]

    def before_fetch(number: int) -> None:
        asked[number].set()
        if number > 1:
            assert computing[number - 1].wait(SECONDS)

    def during_step(number: int) -> None:
        computing[number].set()
        if number < 4:
            assert asked[number + 1].wait(SECONDS)

    threads = watch_fetches(table, before_fetch)
    costs = StepCosts()
    with Feeder(Watched(during_step), table, 1, 10, costs) as feeder:
        feeder.prefill(0, PROMPT)
        assert len(helpers()) == 1
    assert threads[0] == threading.current_thread().name
    assert [name.startswith("edge-memllm-records") for name in threads] == [False, *[True] * 3]
    assert 0 < costs.wait_seconds < costs.prefill_seconds


def test_a_prompt_of_one_chunk_needs_no_thread(table: Table) -> None:
    with Feeder(FakeRuntime(VOCABULARY, CONTEXT), table, 1, 64) as feeder:
        feeder.prefill(0, PROMPT)
        feeder.skip(0, [])
        assert not helpers()


@pytest.mark.parametrize("chunks", [2, 3, 12])
def test_two_buffers_do_for_any_prompt_and_go_when_decoding_begins(
    table: Table, chunks: int
) -> None:
    runtime = Watched()
    with Feeder(runtime, table, 1, 10) as feeder:
        feeder.prefill(0, [token % 300 for token in range(10 * chunks)])
        wide = {id(buffer): buffer for buffer in runtime.buffers}
        assert len(runtime.buffers) == chunks
        assert [buffer.capacity for buffer in wide.values()] == [10, 10]
        feeder.decode([5])
        assert runtime.buffers[-1].capacity == 1
        assert not feeder._reader._buffers


def test_a_damaged_record_is_met_when_it_is_its_turn(tmp_path: Path) -> None:
    made = write_small_artifact(tmp_path / "a")
    data = bytearray(made.table.read_bytes())
    data[made.manifest.table.records_offset + 25 * made.manifest.table.stride] ^= 1
    made.table.write_bytes(data)
    with Artifact.open(made.path) as artifact:
        damaged = Table.open(artifact, "pread")
        runtime = Watched()
        with pytest.raises(CorruptionError, match="the record of token 25 "):
            list(tokens_of(runtime, damaged, sequence(PROMPT), prefill_chunk=10))
        assert runtime.steps == 2
        assert runtime.caches[0].closed
        assert not helpers()
        damaged.close()


def test_the_first_error_is_the_one_that_is_told(table: Table) -> None:
    """The step of chunk 2 fails, and so has the reading of chunk 3 by then."""

    def failing_fetch(number: int) -> None:
        if number == 3:
            raise StorageError("chunk 3 cannot be read")

    def failing_step(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    watch_fetches(table, failing_fetch)
    runtime = Watched(failing_step)
    with pytest.raises(KeyboardInterrupt):
        list(tokens_of(runtime, table, sequence(PROMPT), prefill_chunk=10))
    assert runtime.caches[0].closed
    with pytest.raises(StorageError, match="chunk 3 cannot be read"):
        watch_fetches(table, failing_fetch)
        list(tokens_of(Watched(), table, sequence(PROMPT), prefill_chunk=10))


@pytest.fixture
def heard() -> Iterator[None]:
    """Control-C is heard even where tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_control_c_stops_within_a_chunk_and_waits_for_the_thread(table: Table) -> None:
    release = threading.Event()

    def slow_fetch(number: int) -> None:
        if number == 3:
            assert release.wait(SECONDS)

    def interrupted_step(number: int) -> None:
        if number == 2:
            threading.Timer(0.1, release.set).start()
            signal.raise_signal(signal.SIGINT)

    threads = watch_fetches(table, slow_fetch)
    runtime = Watched(interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        list(tokens_of(runtime, table, sequence(PROMPT), prefill_chunk=10))
    assert release.is_set()  # what was being read was waited for
    assert (runtime.steps, len(threads)) == (2, 3)
    assert runtime.caches[0].closed
    assert not helpers()


def test_a_model_survives_an_interrupted_prompt(tmp_path: Path) -> None:
    def interrupted_step(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    made = write_small_artifact(tmp_path / "a")
    with open_small_model(made.path, Watched(interrupted_step)) as model:
        model.prefill_chunk = 10
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPT)
        assert not helpers()
        assert model.generate(PROMPT, max_new_tokens=3, ignore_eos=True)


def test_leaving_the_chunks_early_waits_for_the_one_being_read(table: Table) -> None:
    costs = StepCosts()
    reader = ChunkReader(table, costs)
    chunks = reader.chunks(PROMPT, 10)
    next(chunks)
    chunks.close()
    assert table.statistics.records_read == 20
    assert costs.records_read == 10  # what was used
    reader.close()
    reader.close()


def test_distinct_tokens_are_numbered_as_they_come() -> None:
    distinct, index = number_distinct([7, 3, 7, 9, 3])
    assert distinct.tolist() == [7, 3, 9]
    assert index.tolist() == [[0, 1, 0, 2, 1]]
