"""Drafts in an engine: they change no reply, and are tried where a step is one text's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_memllm import Model, RequestError, Sampling
from edge_memllm.engine import ChoiceStatistics, Engine, Request
from edge_memllm.engine.reply import Reply
from support.engine import WARM, GatedRuntime, held, serial, tokens_of, wait_until
from support.small_model import CONTEXT, open_small_model

requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=30),
    max_new_tokens=st.integers(1, 40),
    sampling=st.sampled_from([Sampling(), WARM]),
    seed=st.integers(0, 5),
    stop=st.sampled_from([(), ("a",), ("bc", "!")]),
    speculate=st.sampled_from([0, 1, 4, 16]),
)


def statistics_of(reply: Reply) -> ChoiceStatistics:
    *_, last = reply
    assert last.statistics is not None
    return last.statistics


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.lists(st.tuples(requests, st.integers(0, 40)), min_size=1, max_size=8),
    slots=st.integers(1, 4),
    chunk=st.integers(1, 20),
    invariant=st.booleans(),
    copies=st.booleans(),
    answers=st.integers(1, 5),
    rolling=st.sampled_from([(None, 0), (2, 2), (8, 8), (8, 15), (12, 40)]),
)
def test_drafts_change_no_reply_whoever_comes_and_goes(
    folder: Path,
    batch: list[tuple[Request, int]],
    slots: int,
    chunk: int,
    invariant: bool,
    copies: bool,
    answers: int,
    rolling: tuple[int | None, int],
) -> None:
    window, rows = rolling
    runtime = GatedRuntime(copies=copies, window=window, rows=rows, answers=answers)
    with open_small_model(folder, runtime) as model:
        expected = [serial(model, request) for request, _ in batch]
        with Engine(model, slots=slots, prefill_chunk=chunk, batch_invariant=invariant) as engine:
            replies = [engine.submit(request) for request, _ in batch]
            for reply, (_, patience), tokens in zip(replies, batch, expected, strict=True):
                if patience < len(tokens) // 2:  # leaves early
                    pieces = iter(reply)
                    found = [next(pieces).token for _ in range(patience)]
                    reply.cancel()
                    assert found == tokens[:patience]
                else:
                    assert tokens_of(reply) == tokens
            again = [engine.submit(request) for request, _ in batch]
            assert [tokens_of(each) for each in again] == expected


def test_a_text_alone_takes_fewer_steps_and_says_so(folder: Path) -> None:
    runtime = GatedRuntime(answers=1)
    with open_small_model(folder, runtime) as model, Engine(model, slots=4) as engine:
        asked: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
        plain = statistics_of(engine.submit(Request([4, 4, 4], **asked)))
        steps = len(runtime.steps)
        told = statistics_of(engine.submit(Request([5, 5, 5], speculate=8, **asked)))
        assert (plain.draft_tokens, plain.accepted_tokens, plain.shared_steps) == (0, 0, 0)
        assert len(runtime.steps) - steps < steps / 3
        assert 25 < told.accepted_tokens <= told.draft_tokens
        assert told.shared_steps == 0
        assert engine.statistics.draft_tokens == told.draft_tokens
        assert engine.statistics.accepted_tokens == told.accepted_tokens


def test_among_others_nothing_is_drafted_and_that_is_told(folder: Path) -> None:
    runtime = GatedRuntime(answers=1)
    with open_small_model(folder, runtime) as model, Engine(model, slots=2) as engine:
        other = held(engine, runtime, Request([7, 8], max_new_tokens=CONTEXT - 4, ignore_eos=True))
        drafted = engine.submit(Request([4, 4, 4], max_new_tokens=20, ignore_eos=True, speculate=8))
        wait_until(lambda: engine.statistics.queued)
        runtime.gate.set()
        told = statistics_of(drafted)
        assert told.draft_tokens == 0
        assert told.shared_steps == 19
        assert statistics_of(other).shared_steps == 0  # it did not ask for drafts


def test_a_step_of_several_tokens_that_fails_ends_that_text_alone(folder: Path) -> None:
    runtime = GatedRuntime(answers=1)
    with open_small_model(folder, runtime) as model, Engine(model, slots=2) as engine:
        asked = Request([4, 4, 4], max_new_tokens=30, ignore_eos=True, speculate=8)
        expected = tokens_of(engine.submit(asked))
        runtime.pause_at = len(runtime.steps) + 2
        reply = engine.submit(asked)
        pieces = iter(reply)
        next(pieces)
        wait_until(lambda: not runtime.gate.is_set())
        runtime.failure = RequestError("no room")
        runtime.gate.set()
        with pytest.raises(RequestError, match="no room"):
            list(pieces)
        assert tokens_of(engine.submit(asked)) == expected


def test_a_text_that_speculates_ends_with_the_context(model: Model) -> None:
    with Engine(model, slots=2) as engine:
        for length in (CONTEXT - 3, CONTEXT - 1, CONTEXT):
            asked = Request([4] * length, max_new_tokens=99, ignore_eos=True, speculate=9)
            assert len(tokens_of(engine.submit(asked))) == CONTEXT - length + 1
