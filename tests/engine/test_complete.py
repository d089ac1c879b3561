"""Several texts computed together by whoever asks, with no thread: `Model.generate` of a list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm import CorruptionError
from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.engine.reply import CollectedText, Generation
from edge_memllm.engine.request import CheckedRequest, Request
from edge_memllm.engine.scheduler import EngineStatistics, Scheduler
from edge_memllm.overlays.loaded import Selection
from edge_memllm.sampling import Sampling
from edge_memllm.table.table import Table
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import VOCABULARY
from support.engine import GatedRuntime
from support.generation import tokens_of
from support.small_model import CONTEXT, byte_tokenizer, open_small_model, write_small_artifact

PROMPTS = [[5, 6, 7, 5, 5], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("artifact") / "a").path


@pytest.fixture(scope="module")
def table(folder: Path) -> Iterator[Table]:
    with Artifact.open(folder) as artifact:
        opened = Table.open(artifact, "pread")
        yield opened
        opened.close()


class StepsRuntime(FakeRuntime):
    """Keeps what its steps were: tokens, and distinct records."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, CONTEXT)
        self.steps: list[tuple[int, int]] = []

    def step(self, buffer: Any, distinct: int, index: Any, *rest: Any, **more: Any) -> Any:
        self.steps.append((index.size, distinct))
        return super().step(buffer, distinct, index, *rest, **more)


def text(
    table: Table, number: int, prompt: list[int], limit: int, ends: Any = (), **sampling: Any
) -> Generation:
    checked = CheckedRequest(
        Request(prompt), prompt, limit, (), frozenset(ends), Sampling(**sampling), 3
    )
    return Generation(number, checked, Selection(table, ()), CollectedText(), byte_tokenizer())


def alone(table: Table, one: Generation) -> list[int]:
    list(tokens_of(FakeRuntime(VOCABULARY, CONTEXT), table, one.sequence))
    return one.sequence.tokens


def together(
    table: Table, texts: list[Generation], runtime: FakeRuntime | None = None
) -> list[list[int]]:
    runtime = runtime or FakeRuntime(VOCABULARY, CONTEXT)
    with Feeder(runtime, table, len(texts), 4) as feeder:
        scheduler = Scheduler(feeder, CONTEXT, CONTEXT, EngineStatistics(), invariant=False)
        for each in texts:
            scheduler.admit(each)
        scheduler.complete()
    return [each.sequence.tokens for each in texts]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "repetition_penalty": 1.3}])
def test_a_batch_gives_what_each_text_gives_alone(table: Table, sampling: Any) -> None:
    def texts() -> list[Generation]:
        return [text(table, n, prompt, 4 + 5 * n, **sampling) for n, prompt in enumerate(PROMPTS)]

    expected = [alone(table, each) for each in texts()]
    assert together(table, texts()) == expected
    assert [len(tokens) for tokens in expected] == [4, 9, 14]


def test_prompts_come_first_and_then_all_texts_in_one_step(table: Table) -> None:
    runtime = StepsRuntime()
    first, second = together(
        table, [text(table, 0, [5, 5, 6, 5, 7], 3), text(table, 1, [8], 3)], runtime
    )
    distinct = [2 - (first[step] == second[step]) for step in (0, 1)]
    assert runtime.steps[:3] == [(4, 2), (1, 1), (1, 1)]
    assert runtime.steps[3:] == [(2, distinct[0]), (2, distinct[1])]


def test_a_beginning_that_prompts_share_is_computed_once(table: Table) -> None:
    runtime, shared = StepsRuntime(), [*range(3, 30)]
    texts = [text(table, n, [*shared, n], 2) for n in range(3)]
    expected = [alone(table, text(table, n, [*shared, n], 2)) for n in range(3)]
    assert together(table, texts, runtime) == expected
    assert sum(size for size, _ in runtime.steps) == len(shared) + 3 + 3


def test_equal_tokens_of_a_step_are_read_once(table: Table) -> None:
    runtime = StepsRuntime()
    together(table, [text(table, 0, [5], 3), text(table, 0, [5], 3)], runtime)
    assert runtime.steps[2:] == [(2, 1), (2, 1)]


def test_an_end_token_ends_one_text_and_the_others_go_on(table: Table) -> None:
    free, other = (
        alone(table, text(table, 0, PROMPTS[0], 12)),
        alone(table, text(table, 1, PROMPTS[1], 12)),
    )
    end = free[4]
    batch = [text(table, 0, PROMPTS[0], 12, ends=[end]), text(table, 1, PROMPTS[1], 12)]
    assert together(table, batch) == [free[: free.index(end) + 1], other]
    assert [each.sequence.finish_reason for each in batch] == ["stop", "length"]


def test_a_full_text_leaves_the_others_room(table: Table) -> None:
    """The first fills the context with its prompt; the second still runs to the end of it."""
    first, second = together(
        table, [text(table, 0, [4] * CONTEXT, 1), text(table, 0, [9], CONTEXT)]
    )
    assert [len(first), len(second)] == [1, CONTEXT]
    assert second == alone(table, text(table, 0, [9], CONTEXT))


@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_what_ends_the_work_is_raised_and_frees_the_cache(
    folder: Path, step: int, failure: type[BaseException]
) -> None:
    class Failing(GatedRuntime):
        def step(self, *arguments: Any, **more: Any) -> Any:
            if len(self.steps) == step:
                raise failure
            return super().step(*arguments, **more)

    runtime = Failing()
    with open_small_model(folder, runtime) as model:
        with pytest.raises(failure) as caught:
            model.generate([[1], [2]], max_new_tokens=9, ignore_eos=True)
        assert runtime.caches[0].closed, caught  # even while the traceback is alive
        assert len(runtime.steps) == step


def test_a_damaged_record_of_one_text_ends_the_list(tmp_path: Path) -> None:
    made = write_small_artifact(tmp_path / "a")
    data = bytearray(made.table.read_bytes())
    data[made.manifest.table.records_offset + 9 * made.manifest.table.stride] ^= 1
    made.table.write_bytes(data)
    with (
        open_small_model(made.path) as model,
        pytest.raises(CorruptionError, match="the record of token 9 "),
    ):
        model.generate([[1], [9]])
