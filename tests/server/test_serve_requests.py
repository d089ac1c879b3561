"""Reading requests: what is taken, what is refused and how; no server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_memllm.server.calls import read_chat, read_completion
from edge_memllm.server.fields import ApiError, BodyFields, shown
from edge_memllm.server.service import Service
from support.checkpoints import BOS, VOCABULARY
from support.server import HELLO, MODEL_ID, chat, complete


def test_what_is_left_out_comes_from_the_artifact_and_from_openai(service: Service) -> None:
    call = complete(service)
    assert call.request.sampling == service.model.sampling
    assert call.request.max_new_tokens == 16
    assert (call.request.choices, call.request.stop, call.request.seed) == (1, (), None)
    assert (call.request.top, call.echo, call.stream) == (None, None, False)
    assert not call.request.penalties.active
    assert chat(service).request.max_new_tokens == 50


def test_null_is_left_out(service: Service) -> None:
    names = "model temperature top_p n seed stop logit_bias user suffix logprobs stream_options"
    call = complete(service, **dict.fromkeys(names.split()))
    assert call == complete(service)


def test_what_is_given_replaces_it(service: Service) -> None:
    call = complete(
        service,
        model=MODEL_ID,
        prompt=["A", "B"],
        n=2,
        best_of=2,
        temperature=1.5,
        top_p=0,
        min_p=0.1,
        seed=-1,
        max_tokens=3.0,
        stop=["x", "yz"],
        logit_bias={"0": -100, "7": 1.5},
        presence_penalty=1,
        frequency_penalty=-2,
        user="me",
        echo=True,
        logprobs=5,
        ignore_eos=True,
        statistics=True,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )
    request = call.request
    assert (request.sampling.temperature, request.sampling.top_k) == (1.5, 7)
    assert 0 < request.sampling.top_p < 1e-6
    assert request.seed == 2**64 - 1
    assert request.stop == ("x", "yz")
    assert request.penalties.logit_bias == {0: -100.0, 7: 1.5}
    assert (request.penalties.presence_penalty, request.penalties.frequency_penalty) == (1, -2)
    assert call.request.max_new_tokens == 3
    assert call.usage
    assert call.statistics
    assert request.ignore_eos
    assert call.echo == ["A", "B"]
    first, second = call.requests("127.0.0.1", 9.0)
    assert first.client == second.client == "127.0.0.1/me"
    assert (first.top, first.score_prompt, first.choices, first.timeout) == (5, True, 2, 9.0)


def test_users_of_one_client_take_turns(service: Service) -> None:
    clients = [
        complete(service, **who).requests("a", None)[0].client
        for who in ({}, {"user": "u"}, {"safety_identifier": "u"}, {"user": "v"})
    ]
    assert clients == ["a", "a/u", "a/u", "a/v"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("AB", [[ord("A") - 33, ord("B") - 33]]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["A", [5]], [[ord("A") - 33], [5]]),
        ("", [[BOS]]),
    ],
)
def test_prompts(service: Service, prompt: Any, expected: list[list[int]]) -> None:
    assert [list(ids) or [BOS] for ids in complete(service, prompt=prompt).prompts] == expected


@pytest.mark.parametrize("read", [complete, chat])
def test_another_model_is_not_found(service: Service, read: Any) -> None:
    with pytest.raises(ApiError, match='no model "gpt-9" here') as refused:
        read(service, model="gpt-9")
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_values_are_shown_in_a_few_words_of_ascii() -> None:
    assert shown("\u202eevil\x1b") == '"\\u202eevil\\u001b"'
    assert shown("x" * 1000) == '"' + "x" * 55 + '..."'
    assert len(shown("\u00e9" * 1000)) <= 60
    assert shown(10**5000) == "an integer beyond 64 bits"
    assert shown({"a": 1}) == "an object"


NAMES = (
    *("model", "prompt", "n", "best_of", "max_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("seed", "stop", "stream", "echo", "user", "logprobs", "logit_bias", "stream_options"),
    *("response_format", "overlays", "presence_penalty", "messages", "tools", "top_logprobs"),
    "max_completion_tokens",
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**66), 2**66)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["user", "json_schema", "json_object", "text", MODEL_ID]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "name", "schema", "json_schema", "1"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6), chatting=st.booleans())
def test_any_object_is_understood_or_refused(
    service: Service, body: dict[str, Any], chatting: bool
) -> None:
    body = json.loads(json.dumps(body))
    read, base = (
        (read_chat, {"messages": HELLO})
        if chatting
        else (
            read_completion,
            {"prompt": "x"},
        )
    )
    try:
        call = read(BodyFields(base | body), service)
    except ApiError as error:
        assert error.status in (400, 404)
        assert json.loads(error.response().body) == error.body()
        return
    for request in call.requests("me", None):
        assert all(0 <= token < VOCABULARY for token in request.prompt)
        assert 0 <= request.max_new_tokens <= 50
        assert 1 <= request.choices <= 4
