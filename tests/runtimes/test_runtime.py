"""The one contract of all runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_memllm import RequestError
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import RuntimeUnavailableError
from edge_memllm.table.table import Table
from edge_memllm_runtimes import open_runtime
from edge_memllm_runtimes.fake import FakeRuntime
from edge_memllm_runtimes.kv_cache import FIRST_CAPACITY
from edge_memllm_runtimes.options import RuntimeOptions
from support.checkpoints import CONTEXT, VOCABULARY, MakeArtifact, MakeCheckpoint
from support.runtimes import (
    ARTIFACTS,
    LONG,
    TEXT,
    Case,
    closely,
    exactly,
    in_effect,
    scores,
    torch_reference,
)


@pytest.fixture(scope="module", params=["fake", "torch", *ARTIFACTS])
def case(
    request: pytest.FixtureRequest, make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> Iterator[Case]:
    name = request.param
    with (
        Artifact.open(make_artifact(**ARTIFACTS.get(name, ARTIFACTS["fp32"]))) as artifact,
        closing(Table.open(artifact, "ram")) as table,
    ):
        if name == "fake":
            yield Case(FakeRuntime(VOCABULARY, CONTEXT), table, exactly)
        elif name == "torch":
            yield Case(torch_reference(make_checkpoint()), table, closely)
        else:
            with closing(open_runtime(artifact, "cpu", RuntimeOptions(threads=1))) as runtime:
                yield Case(runtime, table, closely if name.startswith("fp32") else in_effect)


# The contract


def test_logits_are_floats_of_the_positions_asked_for(case: Case) -> None:
    everything = scores(case, TEXT)
    buffer = RecordBuffer(case.table.layout, len(TEXT))
    distinct, index = np.unique(TEXT, return_inverse=True)
    case.table.fetch(distinct, buffer)
    cache = case.runtime.new_cache(1)
    wanted = np.array([[len(TEXT) - 2, len(TEXT) - 1]])
    logits = case.runtime.step(buffer, len(distinct), index.reshape(1, -1), cache, wanted)
    assert logits.dtype in (np.float32, np.float16)
    assert logits.shape == (1, 2, VOCABULARY)
    case.same(logits[0], everything[-2:])
    assert cache.lengths.tolist() == [len(TEXT)]
    assert cache.batch == 1
    cache.close()


@pytest.mark.parametrize("wanted", [[0], [1, 0], [0, 2], [-1]])
def test_others_than_the_last_positions_are_refused(case: Case, wanted: list[int]) -> None:
    buffer = RecordBuffer(case.table.layout, 3)
    case.table.fetch(np.array([5, 6, 7]), buffer)
    cache = case.runtime.new_cache(1)
    with pytest.raises(ValueError, match="expected the last K of 3 positions in order"):
        case.runtime.step(buffer, 3, np.array([[0, 1, 2]]), cache, np.array([wanted]))
    assert cache.lengths.tolist() == [0]


def test_no_logits_can_be_asked_for(case: Case) -> None:
    buffer = RecordBuffer(case.table.layout, 1)
    case.table.fetch(np.array([5]), buffer)
    cache = case.runtime.new_cache(1)
    logits = case.runtime.step(buffer, 1, np.array([[0]]), cache, None)
    assert logits.shape == (1, 0, VOCABULARY)
    assert cache.lengths.tolist() == [1]


def test_the_size_of_chunks_does_not_matter(case: Case) -> None:
    case.same(scores(case, TEXT, 7), scores(case, TEXT))


def test_one_token_at_a_time_gives_what_the_whole_text_gives(case: Case) -> None:
    case.same(scores(case, TEXT, 1), scores(case, TEXT))
    with Feeder(case.runtime, case.table, 1, 8) as feeder:
        rows = [feeder.prefill(0, TEXT[:5]).copy()]
        rows += [feeder.decode([token])[0].copy() for token in TEXT[5:]]
    case.same(np.array(rows), scores(case, TEXT)[4:])


def test_a_batch_gives_what_each_text_gives_alone(case: Case) -> None:
    texts = [TEXT, LONG[:21], TEXT[10:11]]
    with Feeder(case.runtime, case.table, 3, 8) as feeder:
        for number, text in enumerate(texts):
            case.same(feeder.prefill(number, text), scores(case, text)[-1])
        steps = [feeder.decode([40 + n, 50, 60 - n]).copy() for n in range(6)]
        assert feeder.cache.lengths.tolist() == [len(text) + 6 for text in texts]
    for number, text in enumerate(texts):
        more = [[40 + n, 50, 60 - n][number] for n in range(6)]
        alone = scores(case, text + more)[len(text) :]
        case.same(np.array([step[number] for step in steps]), alone)


def test_the_cache_grows_with_the_text(case: Case) -> None:
    expected = scores(case, LONG)
    with Feeder(case.runtime, case.table, 2, 64) as feeder:
        feeder.prefill(1, TEXT)
        assert feeder.cache.capacity == FIRST_CAPACITY
        small = feeder.cache.nbytes
        feeder.skip(0, LONG[:-20])
        assert feeder.cache.capacity == 2 * FIRST_CAPACITY
        assert feeder.cache.nbytes >= small > 0
        case.same(feeder.prefill(0, LONG[-20:]), expected[-1])
        case.same(feeder.decode([1, 2])[1], scores(case, [*TEXT, 2])[-1])


def test_rewinding_forgets(case: Case) -> None:
    with Feeder(case.runtime, case.table, 1, 64) as feeder:
        feeder.prefill(0, TEXT)
        feeder.cache.truncate(0, 10)
        case.same(feeder.prefill(0, LONG[:9]), scores(case, TEXT[:10] + LONG[:9])[-1])
        with pytest.raises(ValueError, match="length is 20, expected 0 to 19"):
            feeder.cache.truncate(0, 20)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 70), st.booleans()), max_size=9))
def test_any_order_of_steps_leaves_each_text_its_own(
    case: Case, steps: list[tuple[int, int, bool]]
) -> None:
    texts: list[list[int]] = [[], [], []]
    with Feeder(case.runtime, case.table, 3, 16) as feeder:
        for place, (sequence, size, rewind) in enumerate(steps):
            text = texts[sequence]
            if rewind:
                del text[size:]
                feeder.cache.truncate(sequence, len(text))
            elif size:
                more = [(place * 31 + n * 7) % 250 for n in range(size)]
                feeder.skip(sequence, more)
                text += more
            else:
                feeder.decode([place, place + 1, place])
                for each, token in zip(texts, [place, place + 1, place], strict=True):
                    each.append(token)
        assert feeder.cache.lengths.tolist() == [len(text) for text in texts]
        last = feeder.decode([11, 12, 13]).copy()
    for number, text in enumerate(texts):
        case.same(last[number], scores(case, [*text, 11 + number])[-1])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["grow", "copy", "swap", "some"]),
            st.integers(0, 3),
            st.integers(0, 3),
            st.integers(1, 90),
        ),
        max_size=10,
    )
)
def test_texts_can_be_copied_swapped_and_advanced_in_part(
    case: Case, steps: list[tuple[str, int, int, int]]
) -> None:
    texts: list[list[int]] = [TEXT[:3], [], TEXT[:30], []]
    with Feeder(case.runtime, case.table, 4, 32) as feeder:
        for number, text in enumerate(texts):
            feeder.skip(number, text)
        for kind, one, other, size in steps:
            if kind == "grow":
                more = [(one * 31 + n * 7) % 250 for n in range(size)]
                feeder.skip(one, more)
                texts[one] = texts[one] + more
            elif kind == "copy":
                length = min(size, len(texts[other]))
                feeder.cache.copy(one, other, length)
                texts[one] = texts[other][:length]
            elif kind == "swap":
                feeder.cache.swap(one, other)
                texts[one], texts[other] = texts[other], texts[one]
            else:
                some = range(min(one, other), max(one, other) + 1)
                feeder.decode([size + each for each in some], some)
                for each in some:
                    texts[each] = [*texts[each], size + each]
        assert feeder.cache.lengths.tolist() == [len(text) for text in texts]
        last = feeder.decode([12, 13], range(1, 3)).copy()
    for number in (1, 2):
        case.same(last[number - 1], scores(case, [*texts[number], 11 + number])[-1])


def test_a_copy_longer_than_its_source_is_refused(case: Case) -> None:
    with Feeder(case.runtime, case.table, 2, 64) as feeder:
        feeder.skip(1, TEXT[:5])
        with pytest.raises(ValueError, match="length is 6, expected 0 to 5"):
            feeder.cache.copy(0, 1, 6)


def test_a_cache_that_cannot_move_what_it_holds_says_so(case: Case) -> None:
    cache = case.runtime.new_cache(2)
    cache.copies = False  # type: ignore[misc]
    with pytest.raises(ValueError, match="cannot move what it holds: its `copies` is False"):
        cache.swap(0, 1)


def test_two_caches_do_not_disturb_each_other(case: Case) -> None:
    with (
        Feeder(case.runtime, case.table, 1, 64) as one,
        Feeder(case.runtime, case.table, 1, 64) as other,
    ):
        one.prefill(0, TEXT[:20])
        other.prefill(0, LONG[:33])
        case.same(one.prefill(0, TEXT[20:]), scores(case, TEXT)[-1])
        case.same(other.decode([9])[0], scores(case, [*LONG[:33], 9])[-1])


def test_four_threads_get_what_one_gets(case: Case) -> None:
    texts = [TEXT[n:] + LONG[: 3 * n] for n in range(12)]

    def last(text: list[int]) -> np.ndarray:
        with Feeder(case.runtime, case.table, 1, 16) as feeder:
            feeder.prefill(0, text)
            return np.array([feeder.decode([token])[0].copy() for token in TEXT[:5]])

    expected = [last(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(last, texts), expected, strict=True):
            exactly(found, one)


def test_a_text_ends_with_the_context(case: Case) -> None:
    with Feeder(case.runtime, case.table, 1, 256) as feeder:
        feeder.skip(0, [3] * (CONTEXT - 1))
        feeder.decode([4])
        with pytest.raises(RequestError, match="513 positions are needed and the model's context"):
            feeder.decode([5])
        assert feeder.cache.lengths.tolist() == [CONTEXT]


@pytest.mark.parametrize(
    ("index", "wanted", "sequence", "message"),
    [
        ([[0, 0], [0, 0]], [[0], [0]], None, r"token_index \(2, 2\) does not fit a cache of 2"),
        ([[0]], [[0]], None, r"token_index \(1, 1\) does not fit a cache of 2"),
        ([[0]], [[0]], 2, "does not fit a cache of 2 sequences"),
        ([[0]], [[0]], -1, "does not fit a cache of 2 sequences"),
        ([[]], [[]], 0, r"token_index \(1, 0\) does not fit"),
        ([[0], [0]], [[0], [0]], range(1, 3), r"\(2, 1\) does not fit a cache of 2 sequences"),
        ([[0, 0]], [[0]], range(1), r"\(1, 2\) does not fit a cache of 2 sequences"),
        ([[0]], [[0]], range(0, 2, 2), r"\(1, 1\) does not fit a cache of 2 sequences"),
        ([[0], [0]], [[0]], None, r"logits_index \(1, 1\), expected \[2, K\]"),
        ([[1]], [[0]], 0, "token_index goes from 1 to 1, expected 0 to 0"),
        ([[-1]], [[0]], 0, "token_index goes from -1 to -1"),
        ([[0, 0]], [[2]], 0, r"logits_index \[\[2\]\], expected the last K of 2 positions"),
        ([[0, 0]], [[-1]], 0, r"logits_index \[\[-1\]\], expected the last K of 2 positions"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    case: Case, index: Any, wanted: Any, sequence: int | range | None, message: str
) -> None:
    buffer = RecordBuffer(case.table.layout, 1)
    case.table.fetch(np.array([5]), buffer)
    cache = case.runtime.new_cache(2)
    arrays = (np.array(index, np.int64), np.array(wanted, np.int64))
    with pytest.raises(ValueError, match=message):
        case.runtime.step(buffer, 1, arrays[0], cache, arrays[1], sequence=sequence)
    assert cache.lengths.tolist() == [0, 0]


def test_a_cache_of_another_runtime_is_refused(case: Case) -> None:
    class Foreign:
        batch = 1

    buffer = RecordBuffer(case.table.layout, 1)
    with pytest.raises(TypeError, match="a Foreign was given, expected the runtime's own cache"):
        case.runtime.step(buffer, 1, np.array([[0]]), Foreign(), None)  # type: ignore[arg-type]


def test_a_closed_cache_holds_nothing(case: Case) -> None:
    with Feeder(case.runtime, case.table, 1, 64) as feeder:
        feeder.prefill(0, TEXT)
    assert feeder.cache.nbytes == 0
    feeder.cache.close()
    with pytest.raises(ValueError, match="the cache is closed, expected an open one"):
        feeder.decode([1])


CONTRACT = (
    test_logits_are_floats_of_the_positions_asked_for,
    test_no_logits_can_be_asked_for,
    test_the_size_of_chunks_does_not_matter,
    test_one_token_at_a_time_gives_what_the_whole_text_gives,
    test_a_batch_gives_what_each_text_gives_alone,
    test_the_cache_grows_with_the_text,
    test_rewinding_forgets,
    test_two_caches_do_not_disturb_each_other,
    test_four_threads_get_what_one_gets,
    test_a_text_ends_with_the_context,
    test_a_closed_cache_holds_nothing,
)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fp16", "int8", "int4"])
def test_cuda_keeps_the_contract(form: str, make_artifact: MakeArtifact) -> None:
    with (
        Artifact.open(make_artifact(**ARTIFACTS[form])) as artifact,
        closing(Table.open(artifact, "ram")) as table,
    ):
        try:
            runtime = open_runtime(artifact, "cuda")
        except RuntimeUnavailableError as error:
            pytest.skip(str(error))
        with (
            closing(runtime),
            closing(open_runtime(artifact, "cpu", RuntimeOptions(threads=1))) as judge,
        ):
            case = Case(runtime, table, in_effect)
            assert runtime.device == "cuda"
            for check in CONTRACT:
                check(case)
            in_effect(scores(case, LONG), scores(Case(judge, table, in_effect), LONG))
