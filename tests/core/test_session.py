"""Sessions: a text that stays, on the fake runtime and on real graphs."""

from __future__ import annotations

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm import Model, RequestError, Sampling
from edge_memllm.errors import Cancellation, GenerationCancelledError
from edge_memllm.overlays import Edit, OverlaySpec, overlay_of
from edge_memllm.session import Session
from support.checkpoints import MakeArtifact
from support.engine import GatedRuntime, wait_until
from support.overlays import row
from support.small_model import CONTEXT, open_small_model

WARM = Sampling(temperature=0.9, repetition_penalty=1.3)
PROMPT = "Once upon a time "


def begun(model: Model, prompt: str = PROMPT, seed: int = 5) -> Session:
    session = model.session(sampling=WARM, seed=seed)
    session.append(prompt)
    return session


def text(session: Session, tokens: int = 8) -> str:
    return session.generate(max_new_tokens=tokens, ignore_eos=True)


def test_a_session_says_what_the_model_says(model: Model) -> None:
    expected = model.generate(PROMPT, max_new_tokens=8, sampling=WARM, seed=5, ignore_eos=True)
    session = begun(model)
    assert text(session) == expected
    assert session.tokens[: len(PROMPT)] == tuple(model.tokenize(PROMPT))
    assert len(session) == len(PROMPT) + 8
    assert session.computed == len(session) - 1
    assert session.text == model.detokenize(session.tokens)


def test_computing_ahead_changes_nothing(model: Model) -> None:
    session = begun(model)
    session.prefill()
    assert session.computed == len(session) == len(PROMPT)
    assert text(session) == text(begun(model))


def test_going_on_computes_only_what_is_new(model: Model) -> None:
    session = begun(model)
    text(session)
    session.append(" and then")
    *_, last = session.stream(max_new_tokens=2, ignore_eos=True)
    assert last.statistics is not None
    assert last.statistics.prompt_tokens == 1 + len(" and then")
    assert last.statistics.seed == 5


def test_two_short_generations_are_one_long_one(model: Model) -> None:
    whole, parts = begun(model), begun(model)
    assert text(parts, 3) + text(parts, 5) == text(whole, 8)
    assert parts.tokens == whole.tokens


def test_an_empty_session_starts_as_an_empty_prompt_does(model: Model) -> None:
    expected = model.generate("", max_new_tokens=4, sampling=WARM, seed=1, ignore_eos=True)
    session = model.session(sampling=WARM, seed=1)
    assert text(session, 4) == expected
    assert len(session) == 5


@pytest.mark.parametrize("speculate", [1, 4])
def test_drafts_change_nothing_and_leave_nothing(model: Model, speculate: int) -> None:
    options = {"max_new_tokens": 12, "ignore_eos": True, "sampling": Sampling()}
    plain, drafted = begun(model, "abab" * 6), begun(model, "abab" * 6)
    assert plain.generate(**options) == drafted.generate(**options, speculate=speculate)
    assert plain.computed == drafted.computed
    assert text(plain) == text(drafted)


def test_rewinding_takes_back_and_tries_again(model: Model) -> None:
    session = begun(model)
    first = text(session)
    assert session.rewind(len(PROMPT)) == len(PROMPT)
    assert session.tokens == tuple(model.tokenize(PROMPT))
    assert text(session) != first  # other random numbers
    session.rewind(len(PROMPT))
    greedy = session.generate(max_new_tokens=4, sampling=Sampling(), ignore_eos=True)
    assert greedy == model.generate(PROMPT, max_new_tokens=4, ignore_eos=True)


def test_rewinding_to_another_text_keeps_what_is_common(model: Model) -> None:
    session = begun(model)
    session.prefill()
    other = model.tokenize("Once upon a hill")
    kept = session.rewind(other)
    assert kept == len("Once upon a ")
    assert session.computed == kept - 1  # the last is computed again: its logits are wanted
    session.append(other[kept:])
    assert text(session) == text(begun(model, "Once upon a hill"))
    assert session.rewind(0) == session.computed == len(session) == 0


@pytest.mark.parametrize("to", [-1, 1000, True])
def test_rewinding_elsewhere_is_refused(model: Model, to: int) -> None:
    with pytest.raises(RequestError, match=r"rewind to .*, expected 0 to 17, or token ids"):
        begun(model).rewind(to)


def test_a_fork_goes_its_own_way(model: Model) -> None:
    session = begun(model)
    text(session)
    fork = session.fork()
    assert fork.tokens == session.tokens
    assert text(fork) == text(session)
    session.append("!")
    session.close()
    assert text(fork)


def test_the_context_is_the_limit(model: Model) -> None:
    session = begun(model)
    with pytest.raises(RequestError, match=r"has 17 tokens, 200 were to be added.*holds 128"):
        session.append("x" * 200)
    assert len(session) == 17
    text(session, 1000)
    assert len(session) == CONTEXT + 1
    with pytest.raises(RequestError, match="129 tokens, more than the 128 of the model's context"):
        text(session)
    with pytest.raises(RequestError, match="max_new_tokens is 0"):
        begun(model).stream(max_new_tokens=0)


def test_wrong_additions_are_refused(model: Model) -> None:
    session = begun(model)
    with pytest.raises(RequestError, match="the prompt is a int, expected text or token ids"):
        session.append(7)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="token 1 is 5000"):
        session.append([1, 5000])
    session.append("")
    assert len(session) == len(PROMPT)


def test_leaving_a_stream_keeps_what_came(model: Model) -> None:
    whole, parts = begun(model), begun(model)
    stream = parts.stream(max_new_tokens=8, ignore_eos=True)
    first = [next(stream).token for _ in range(3)]
    with pytest.raises(RequestError, match="The session is in use"):
        parts.append("more")
    stream.close()
    assert parts.tokens[-3:] == tuple(first)
    text(parts, 5)
    text(whole, 8)
    assert parts.tokens == whole.tokens


def test_cancelling_keeps_what_came(model: Model) -> None:
    session, cancellation = begun(model), Cancellation()
    pieces = []
    with pytest.raises(GenerationCancelledError, match="was cancelled"):
        for piece in session.stream(max_new_tokens=50, ignore_eos=True, cancellation=cancellation):
            pieces.append(piece.token)
            if len(pieces) == 4:
                cancellation.cancel()
    assert session.tokens[len(PROMPT) :] == tuple(pieces)
    assert len(pieces) == 4
    whole = begun(model)
    text(whole, 10)
    text(session, 6)
    assert session.tokens == whole.tokens


def test_a_cancelled_prefill_goes_on_later(folder: Path) -> None:
    with open_small_model(folder) as model:
        model.prefill_chunk = 4
        cancellation = Cancellation()
        session = begun(model)
        cancellation.cancel()
        with pytest.raises(GenerationCancelledError):
            session.prefill(cancellation=cancellation)
        assert session.computed == 0
        assert text(session) == text(begun(model))


def test_sessions_end_with_their_model(folder: Path) -> None:
    with open_small_model(folder) as model:
        session, closed = begun(model), begun(model)
        closed.close()
        closed.close()
        with pytest.raises(RequestError, match="The session is closed"):
            text(closed)
    with pytest.raises(RequestError, match="The model is closed"):
        text(session)
    with pytest.raises(RequestError, match="The model is closed"):
        model.session()
    assert session._feeder.cache.closed


def test_closing_waits_for_the_step_under_way(folder: Path) -> None:
    runtime = GatedRuntime()
    with open_small_model(folder, runtime) as model:
        session = begun(model)
        stream = session.stream(ignore_eos=True)
        next(stream)
        runtime.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            step = pool.submit(next, stream)
            wait_until(session._turn.step.locked)
            closed = pool.submit(session.close)
            assert not session._feeder.cache.closed
            runtime.gate.set()
            assert step.result(10).token >= 0
            closed.result(10)
        assert session._feeder.cache.closed
        with pytest.raises(RequestError, match="The session is closed"):
            next(stream)


def test_a_forgotten_session_frees_its_memory(model: Model) -> None:
    session = begun(model)
    session.prefill()
    cache = session._feeder.cache
    del session
    gc.collect()
    assert cache.closed


def test_overlays_are_for_good(model: Model) -> None:
    spec = OverlaySpec.for_model(model.manifest, "a", codec="f32")
    model.add_overlay(overlay_of(spec, [Edit(model.tokenize("n")[0], 1, "replace", row(1))]))
    session, plain = begun(model), model.session(sampling=WARM, seed=5, overlays=())
    plain.append(PROMPT)
    assert (session.overlays, plain.overlays) == (("a",), ())
    model.remove_overlay("a")
    assert text(session) != text(plain)
    with pytest.raises(RequestError, match="no overlay 'a'"):
        model.session(overlays=["a"])


FORMS = [{}, {"graph_weights": "fp32", "table_codec": "f32"}, {"kv_dtype": "int8", "beta": 3}]
GO_ON = """
import sys, edge_memllm
with edge_memllm.load(sys.argv[1]) as model:
    session = model.restore_session(sys.argv[2])
    pieces = session.stream(max_new_tokens=12, ignore_eos=True)
    print([piece.token for piece in pieces])
"""


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_another_process_goes_on_bit_for_bit(
    make_artifact: MakeArtifact, tmp_path: Path, form: dict[str, str]
) -> None:
    artifact, saved = make_artifact(**form), tmp_path / "talk.session"
    with edge_memllm.load(artifact, device="cpu") as model:
        session = begun(model)
        text(session, 20)
        session.append(" the end. ")
        session.prefill()
        size = session.save(saved)
        assert size == saved.stat().st_size
        done = subprocess.run(
            [sys.executable, "-c", GO_ON, str(artifact), str(saved)],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        expected = [piece.token for piece in session.stream(max_new_tokens=12, ignore_eos=True)]
        assert done.stdout.strip() == str(expected)
        fork = session.fork()
        assert text(fork, 5) == text(session, 5)
