"""What is refused, and that it is refused before any work is done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edge_memllm
from edge_memllm import Model, RequestError
from edge_memllm.engine import Engine
from edge_memllm.engine.request import Request, check_tokens, prompt_tokens, token_limit
from edge_memllm.errors import ArtifactError, Cancellation
from edge_memllm.sampling import Penalties
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import BOS, EOS, VOCABULARY
from support.small_model import CONTEXT, byte_tokenizer, open_small_model, write_small_artifact


class Untouchable(FakeRuntime):
    def new_cache(self, batch: int) -> Any:
        raise AssertionError("work was done")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": [1] * (CONTEXT + 1)}, "has 129 tokens and the model's context holds 128"),
        ({"prompt": "x" * 1000}, "has 1000 tokens and the model's context holds 128"),
        ({"prompt": [1, -1]}, "token 1 is -1, expected an integer from 0 to 299"),
        ({"prompt": [300]}, "token 0 is 300, expected"),
        ({"prompt": [True]}, "token 0 is True"),
        ({"prompt": [1.0]}, r"token 0 is 1\.0"),
        ({"prompt": [np.float32(1)]}, "token 0 is "),
        ({"prompt": [2**63]}, "token 0 is a huge integer"),
        ({"prompt": [10**5000]}, "token 0 is a huge integer"),
        ({"prompt": [None]}, "token 0 is None"),
        ({"prompt": "\ud800"}, "is not text"),
        ({"prompt": 5}, "the prompt is a int, expected text or token ids"),
        ({"prompt": b"ab"}, "the prompt is a bytes, expected text or token ids"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected an integer of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens is True, expected an integer"),
        ({"max_new_tokens": 1.5}, r"max_new_tokens is 1\.5"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"stop": ""}, "a stop string has 0 characters"),
        ({"seed": -1}, "seed is -1"),
        ({"speculate": -1}, "speculate is -1, expected an integer from 0 to 64"),
        ({"speculate": 65}, "speculate is 65"),
        ({"speculate": 1.0}, r"speculate is 1\.0"),
        ({"speculate": True}, "speculate is True"),
        ({"top_of": "all"}, "top_of is 'all', expected 'model' or 'sampling'"),
    ],
)
@pytest.mark.parametrize("call", ["stream", "generate"])
def test_what_cannot_be_done_is_refused(
    folder: Path, call: str, request_: dict[str, Any], message: str
) -> None:
    with (
        open_small_model(folder, Untouchable(VOCABULARY)) as model,
        pytest.raises(RequestError, match=message),
    ):
        getattr(model, call)(**{"prompt": "one", **request_})  # a stream need not be started


def test_drafts_for_a_list_of_prompts_are_refused(folder: Path) -> None:
    message = r"speculate is 4 and a list of prompts was given: .* Give one prompt"
    with (
        open_small_model(folder, Untouchable(VOCABULARY)) as model,
        pytest.raises(RequestError, match=message),
    ):
        model.generate(["one", "two"], speculate=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("choices", 2),
        ("score_prompt", True),
        ("trace", True),
        ("client", "me"),
        ("timeout", 1.0),
        ("since", 0.0),
    ],
)
def test_what_only_an_engine_does_is_refused_by_name(model: Model, field: str, value: Any) -> None:
    message = rf"^{field} is {value!r}: one text alone has none of that\. Submit the request to an"
    asked: dict[str, Any] = {field: value}
    with model.session() as session:
        session.append("a")
        for call in (
            lambda: model.stream("a", **asked),
            lambda: model.generate("a", **asked),
            lambda: model.generate(["a", "b"], **asked),
            lambda: model.astream("a", **asked),
            lambda: session.stream(**asked),
            lambda: session.generate(**asked),
        ):
            with pytest.raises(RequestError, match=message):
                call()


def test_what_an_engine_does_not_do_is_refused_by_name(model: Model) -> None:
    message = r"cancellation is <.*: a reply of an engine has"
    with Engine(model) as engine, pytest.raises(RequestError, match=message):
        engine.submit(Request("a", cancellation=Cancellation()))


@pytest.mark.parametrize("asked", [{"seed": 1}, {"overlays": ()}, {"without_memory": True}])
def test_what_a_session_keeps_is_refused_by_name(model: Model, asked: dict[str, Any]) -> None:
    with model.session() as session:
        session.append("a")
        with pytest.raises(RequestError, match=f"^{next(iter(asked))} is .*Model.session"):
            session.stream(**asked)


def test_a_stream_of_asyncio_has_no_other_cancellation(model: Model) -> None:
    with pytest.raises(RequestError, match=r"cancellation is .* ends with its task"):
        model.astream("a", cancellation=Cancellation())


def test_one_text_takes_penalties_constraints_and_no_memory(model: Model) -> None:
    class Only:
        def allowed(self) -> Any:
            return np.arange(VOCABULARY) == 70

        def advance(self, token: int) -> None:
            assert token == 70

    forced = Penalties(logit_bias={65: 100})
    tokens = [piece.token for piece in model.stream("a", penalties=forced, max_new_tokens=3)]
    assert tokens == [65] * 3
    for prompt in ("a", ["a", "b"]):
        text = model.generate(prompt, constraint=Only, max_new_tokens=2)  # type: ignore[call-overload]
        assert text in (model.detokenize([70, 70]), [model.detokenize([70, 70])] * 2)
    with model.session() as session:
        session.append("a")
        assert session.generate(penalties=forced, max_new_tokens=2) == model.detokenize([65, 65])
    with Engine(model) as engine:
        reply = engine.submit(Request("a", without_memory=True, max_new_tokens=5, ignore_eos=True))
        expected = [piece.token for piece in reply]
    asked = model.stream("a", without_memory=True, max_new_tokens=5, ignore_eos=True)
    assert [piece.token for piece in asked] == expected


@given(st.integers(-(2**63), 2**63))
def test_ids_are_checked_at_both_ends(token: int) -> None:
    if 0 <= token < VOCABULARY:
        assert check_tokens([np.int64(token)], VOCABULARY) == [token]
    else:
        with pytest.raises(RequestError, match="token 0 is"):
            check_tokens([token], VOCABULARY)


def test_detokenizing_checks_ids(model: Model) -> None:
    with pytest.raises(RequestError, match="token 0 is -1"):
        model.detokenize([-1])


def test_an_empty_prompt_starts_a_text(model: Model) -> None:
    assert model.generate("", seed=0) == model.generate([BOS], seed=0)
    assert model.generate([], seed=0) == model.generate([BOS], seed=0)


def test_an_empty_prompt_takes_the_end_token_if_there_is_no_other(folder: Path) -> None:
    with open_small_model(folder) as model:
        spec = dataclasses.replace(model.manifest.model, bos_token_id=None)
    assert prompt_tokens("", byte_tokenizer(), spec) == [EOS]
    with pytest.raises(RequestError, match="the prompt is empty and the model has no token"):
        prompt_tokens("", byte_tokenizer(), dataclasses.replace(spec, eos_token_ids=()))


def test_a_text_ends_with_the_context(model: Model) -> None:
    *_, last = pieces = list(model.stream([1] * 100, max_new_tokens=10**30, ignore_eos=True))
    assert len(pieces) == CONTEXT - 100 + 1  # the last one is chosen and never fed
    assert last.finish_reason == "length"
    assert token_limit(50, 100, CONTEXT) == 29
    full = list(model.stream([1] * CONTEXT, ignore_eos=True))
    assert len(full) == 1


@pytest.mark.parametrize("chunk", [0, -3, 1.5, True])
def test_a_prefill_chunk_must_be_positive(folder: Path, chunk: Any) -> None:
    with pytest.raises(RequestError, match=r"prefill_chunk is .*, expected an integer of at least"):
        edge_memllm.load(folder, prefill_chunk=chunk)


@pytest.mark.parametrize("config", [b'{"temperature": "hot", "do_sample": true}', b'{"top_p'])
def test_a_broken_generation_config_is_refused(tmp_path: Path, config: bytes) -> None:
    made = write_small_artifact(tmp_path / "a", generation_config__json=config)
    with pytest.raises(
        ArtifactError, match=r"generation_config\.json: (temperature is|not valid JSON|found)"
    ):
        open_small_model(made.path)
