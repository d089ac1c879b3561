"""Replies of the engine: equal to serial ones, whoever else comes and goes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_memllm import Model, RequestError, Sampling
from edge_memllm.engine import Engine, Request
from edge_memllm.overlays import Edit, Overlay, OverlaySpec, overlay_of
from edge_memllm.sampling import Penalties
from support.checkpoints import EOS, VOCABULARY
from support.engine import WARM, GatedRuntime, held, serial, text_of, tokens_of, wait_until
from support.small_model import open_small_model

requests = st.builds(
    Request,
    prompt=st.builds(
        lambda start, rest: [7, 8, 9, 7, 8, 9, 1, 2, 3, 4, 5, 6][:start] + rest,
        st.integers(0, 12),
        st.lists(st.integers(0, 99), min_size=1, max_size=40),
    ),
    max_new_tokens=st.integers(1, 30),
    sampling=st.sampled_from([Sampling(), WARM]),
    seed=st.integers(0, 5),
    stop=st.sampled_from([(), ("a",), ("bc", "!")]),
    client=st.sampled_from(["a", "b", "c"]),
    overlays=st.sampled_from([None, None, (), ("loud",)]),
)


def loud(model: Model) -> Overlay:
    """Rows of some tokens, twice as large."""
    spec = OverlaySpec.for_model(model.manifest, "loud")
    return overlay_of(spec, [Edit(token, 0, "scale", factor=2) for token in range(0, 100, 3)])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.lists(st.tuples(requests, st.integers(0, 40)), min_size=1, max_size=12),
    slots=st.integers(1, 5),
    chunk=st.integers(1, 20),
    invariant=st.booleans(),
    copies=st.booleans(),
    rolling=st.sampled_from([(None, 0), (2, 2), (8, 8), (8, 15), (12, 40)]),
)
def test_replies_are_what_each_request_gets_alone(
    folder: Path,
    batch: list[tuple[Request, int]],
    slots: int,
    chunk: int,
    invariant: bool,
    copies: bool,
    rolling: tuple[int | None, int],
) -> None:
    """Some are cancelled after so many pieces; the others never notice, and no slot is lost."""
    window, rows = rolling
    runtime = GatedRuntime(copies=copies, window=window, rows=rows)
    with open_small_model(folder, runtime) as model:
        model.add_overlay(loud(model))
        expected = [serial(model, request) for request, _ in batch]
        with Engine(model, slots=slots, prefill_chunk=chunk, batch_invariant=invariant) as engine:
            replies = [engine.submit(request) for request, _ in batch]

            def read(number: int) -> list[int | None]:
                found = []
                with replies[number] as reply:
                    for piece in reply:
                        found.append(piece.token)
                        if len(found) == batch[number][1]:
                            break
                return found

            with ThreadPoolExecutor(len(batch)) as pool:
                found = list(pool.map(read, range(len(batch))))
            for tokens, whole, (_, most) in zip(found, expected, batch, strict=True):
                assert tokens == whole[: most or None]
            wait_until(lambda: engine.statistics.under_way == 0)
            after = engine.statistics
            assert after.queued == 0
            assert after.finished + after.given_up == len(batch)
            again = [tokens_of(engine.submit(request)) for request, _ in batch]
            assert again == expected


def test_a_text_that_goes_on_starts_where_it_ended(model: Model, runtime: GatedRuntime) -> None:
    with Engine(model, slots=3, prefill_chunk=16) as engine:
        first = Request(prompt=[*range(1, 41)], max_new_tokens=10)
        tokens = tokens_of(engine.submit(first))
        longer = Request(prompt=[*first.prompt, *tokens, 5, 6], max_new_tokens=4)
        pieces = list(engine.submit(longer))
        assert [piece.token for piece in pieces] == serial(model, longer)
        assert pieces[-1].statistics.reused_tokens == 49  # the last token was never fed
        assert pieces[-1].statistics.prompt_tokens == 52
        assert engine.statistics.reused_tokens == 49
        assert engine.statistics.prompt_tokens == 40 + 3


def test_choices_compute_their_prompt_once(model: Model) -> None:
    request = Request(prompt=[*range(1, 71)], max_new_tokens=6, sampling=WARM, seed=4, choices=3)
    with Engine(model, slots=2, prefill_chunk=16) as engine:
        reply = engine.submit(request)
        texts = ["", "", ""]
        for piece in reply:
            texts[piece.choice] += piece.text
        assert engine.statistics.prompt_tokens == 70 + 2
    prompts = [list(request.prompt)] * 3
    assert texts == model.generate(prompts, max_new_tokens=6, sampling=WARM, seed=4)


def test_a_beginning_that_is_being_computed_is_waited_for(model: Model, runtime: Any) -> None:
    shared = [*range(1, 65)]
    with Engine(model, slots=4, prefill_chunk=8) as engine:
        first = held(engine, runtime, Request(prompt=[*shared, 90], max_new_tokens=3))
        second = engine.submit(Request(prompt=[*shared, 91], max_new_tokens=3))
        runtime.gate.set()
        text_of(first)
        assert list(second)[-1].statistics.reused_tokens == 64


def test_a_scored_prompt_is_computed_whole(model: Model) -> None:
    request = Request(prompt=[*range(1, 31)], max_new_tokens=2, top=2, score_prompt=True)
    with Engine(model, prefill_chunk=8) as engine:
        for _ in range(2):
            reply = engine.submit(request)
            assert list(reply)[-1].statistics.reused_tokens == 0
            assert reply.prompt_scores is not None
            assert [score.token for score in reply.prompt_scores] == request.prompt
            assert [len(score.top) for score in reply.prompt_scores] == [0] + [2] * 29


def test_scores_are_log_probabilities_of_the_model_itself(model: Model) -> None:
    from edge_memllm.engine.feeding import Feeder

    prompt = [5, 6, 7, 8]
    request = Request(
        prompt=prompt, max_new_tokens=3, sampling=WARM, seed=1, top=3, score_prompt=True
    )
    with Engine(model, prefill_chunk=3) as engine:
        reply = engine.submit(request)
        pieces = list(reply)
    text = prompt + [piece.token for piece in pieces]
    with Feeder(model.runtime, model.table, 1, 64) as feeder:
        logits = feeder.score(0, text).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = [*reply.prompt_scores, *(piece.score for piece in pieces)]
    assert scores[0].logprob is None
    for place, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(expected[place, score.token], abs=1e-5)
        best = np.argsort(-expected[place], kind="stable")[:3]
        assert [token for token, _ in score.top] == best.tolist()
        assert [each for _, each in score.top] == pytest.approx(expected[place, best], abs=1e-5)


def test_texts_with_other_overlays_share_nothing(model: Model, runtime: GatedRuntime) -> None:
    model.add_overlay(loud(model))
    prompt = [*range(1, 41)]
    with Engine(model, slots=4, prefill_chunk=16) as engine:
        wishes = [None, (), ("loud",), ()]
        replies = []
        for overlays in wishes:
            request = Request(prompt=prompt, max_new_tokens=6, overlays=overlays, ignore_eos=True)
            replies.append(held(engine, runtime, request))
        model.remove_overlay("loud")
        runtime.gate.set()
        found = [list(reply) for reply in replies]
        assert set(runtime.steps) == {1, 2}  # a step of its own for each set of records
        with pytest.raises(RequestError, match="There is no overlay 'loud'"):
            engine.submit(Request(prompt=prompt, overlays=("loud",)))
    last = [pieces[-1].statistics for pieces in found]
    assert [each.overlays for each in last] == [("loud",), (), ("loud",), ()]
    assert sorted(each.reused_tokens for each in last) == [0, 0, 39, 39]
    texts = [[piece.token for piece in pieces] for pieces in found]
    assert texts[0] == texts[2] != texts[1] == texts[3]


def test_no_tokens_may_be_asked_for(model: Model) -> None:
    with Engine(model) as engine:
        reply = engine.submit(Request(prompt=[1, 2], max_new_tokens=0, top=0, score_prompt=True))
        (piece,) = reply
    assert (piece.token, piece.text, piece.finish_reason) == (None, "", "length")
    assert len(reply.prompt_scores) == 2
    assert piece.statistics.completion_tokens == 0
    assert piece.statistics.first_token_seconds is None


def test_penalties_and_constraints_reach_the_sampler(model: Model) -> None:
    class OnlyOdd:
        def __init__(self) -> None:
            self.taken: list[int] = []
            made.append(self)

        def allowed(self) -> np.ndarray | None:
            return np.arange(VOCABULARY) % 2 == 1

        def advance(self, token: int) -> None:
            self.taken.append(token)

    made: list[OnlyOdd] = []
    with Engine(model) as engine:
        reply = engine.submit(
            Request(
                prompt=[1],
                max_new_tokens=9,
                choices=2,
                sampling=WARM,
                penalties=Penalties(logit_bias={EOS: -100}),
                constraint=OnlyOdd,
            )
        )
        pieces = list(reply)
    for number, each in enumerate(made):
        assert each.taken == [piece.token for piece in pieces if piece.choice == number]
        assert len(each.taken) == 9
        assert all(token % 2 for token in each.taken)


def test_progress_is_told_before_the_first_chunk_and_after_each(model: Model) -> None:
    prompt = [*range(1, 11)]
    with Engine(model, slots=2, prefill_chunk=4) as engine:
        pieces = [*engine.submit(Request(prompt, progress=True, max_new_tokens=2, choices=2))]
        again = [*engine.submit(Request(prompt, progress=True, max_new_tokens=1))]
    told = [piece.progress for piece in pieces if piece.progress is not None]
    assert [(each.tokens, each.reused, each.computed) for each in told] == [
        (10, 0, 0),
        (10, 0, 4),
        (10, 0, 8),
        (10, 0, 10),
    ]
    assert told[0].seconds == 0
    assert [each.seconds for each in told] == sorted(each.seconds for each in told)
    first = next(place for place, piece in enumerate(pieces) if piece.token is not None)
    assert not [piece for piece in pieces[first:] if piece.progress is not None]
    computed = [piece.progress.computed for piece in again if piece.progress is not None]
    assert computed == [9, 10]


def test_a_prompt_can_be_computed_whole(model: Model) -> None:
    asked = Request([*range(1, 30)], max_new_tokens=3, seed=1)
    with Engine(model, slots=2) as engine:
        texts, reused = [], []
        for fresh in (False, True, False):
            *_, last = pieces = [*engine.submit(replace(asked, cache_prompt=not fresh))]
            texts.append([piece.token for piece in pieces])
            reused.append(last.statistics.reused_tokens)
    assert reused == [0, 0, 28]
    assert texts[0] == texts[1] == texts[2]


def test_scores_of_what_a_token_was_drawn_from(model: Model) -> None:
    sampling = Sampling(temperature=0.7, top_k=4)
    asked = Request([7, 8], max_new_tokens=9, sampling=sampling, seed=1, top=9, ignore_eos=True)
    with Engine(model) as engine:
        plain = tokens_of(engine.submit(asked))
        scored = [*engine.submit(replace(asked, top_of="sampling"))]
        greedy = replace(asked, sampling=Sampling(), top_of="sampling", max_new_tokens=1)
        (only,) = engine.submit(greedy)
    assert [piece.token for piece in scored] == plain  # looking changes nothing
    for piece in scored:
        assert len(piece.score.top) == 4
        assert sum(np.exp(value) for _, value in piece.score.top) == pytest.approx(1)
        assert (piece.token, piece.score.logprob) in piece.score.top
        assert [value for _, value in piece.score.top] == sorted(
            (value for _, value in piece.score.top), reverse=True
        )
    assert only.score.top == ((only.token, 0.0),)


def test_the_stop_string_that_ended_a_text_is_told(model: Model) -> None:
    text = "".join(piece.text for piece in model.stream([7, 8], max_new_tokens=20))
    with Engine(model) as engine:
        for stops, expected in ((text[2:4], text[2:4]), ("</s>", "</s>"), ((), None)):
            bias = {EOS: 100.0} if expected == "</s>" else {}
            request = Request([7, 8], stop=stops, penalties=Penalties(logit_bias=bias))
            *_, last = engine.submit(replace(request, max_new_tokens=20))
            assert last.stopped_by == expected
