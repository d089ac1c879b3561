"""BodyFields of requests: each that is known is in one table, and does what the table says."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

from edge_memllm.server.fields import BodyFields
from edge_memllm.server.parameters import PARAMETERS, Endpoint, honoured, not_honoured, same
from edge_memllm.server.service import Service
from support import ROOT
from support.server import (
    HELLO,
    Served,
    chat,
    complete,
    llama,
    message,
    refusal,
    respond,
    serving_small,
)
from support.small_model import write_small_artifact

READ = {
    "completions": complete,
    "chat": chat,
    "responses": respond,
    "messages": message,
    "llama": llama,
}


NOTHING = [
    pytest.param(endpoint, each.name, value, id=f"{endpoint} {each.name} {value!r:.20}")
    for each in PARAMETERS
    if not each.honoured
    for endpoint in each.endpoints
    for value in each.nothing
]


@pytest.mark.parametrize(("endpoint", "name", "value"), NOTHING)
def test_what_asks_for_nothing_changes_nothing(
    service: Service, endpoint: Endpoint, name: str, value: object
) -> None:
    assert READ[endpoint](service, **{name: value}) == READ[endpoint](service)


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [(endpoint, name) for endpoint in READ for name in not_honoured(endpoint)],
)
def test_what_is_not_honoured_is_refused_with_a_reason(
    service: Service, endpoint: Endpoint, name: str
) -> None:
    error = refusal(READ[endpoint], service, **{name: "something nobody means"})
    assert error.param == name
    assert error.code == "unsupported_parameter"
    assert not_honoured(endpoint)[name].meaning in str(error)
    assert READ[endpoint](service, **{name: None}) == READ[endpoint](service)


@pytest.mark.parametrize("endpoint", READ)
def test_the_table_has_all_that_is_read(
    service: Service, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: set[str] = set()
    value = BodyFields.value

    def noting(self: BodyFields, name: str) -> object:
        taken.add(self.param(name))
        return value(self, name)

    monkeypatch.setattr(BodyFields, "value", noting)
    READ[endpoint](service)
    known = set(honoured(endpoint))
    assert {name for name in taken if "." not in name or name in known} == known
    assert not set(honoured(endpoint)) & set(not_honoured(endpoint))


@pytest.mark.parametrize(
    ("endpoint", "described"),
    [
        ("completions", completion_params.CompletionCreateParamsBase.__annotations__),
        ("chat", chat_params.CompletionCreateParamsBase.__annotations__),
        ("responses", response_params.ResponseCreateParamsBase.__annotations__),
    ],
)
def test_the_table_has_all_fields_of_openai(endpoint: Endpoint, described: Any) -> None:
    assert set(described) <= {*honoured(endpoint), *not_honoured(endpoint)}


@pytest.mark.parametrize(
    "body",
    [
        {"n": 1, "best_of": 1},
        {"logit_bias": {}},
        {"logprobs": False},
        {"echo": False},
        {"stop": []},
        {"stop_token_ids": []},
        {"user": ""},
        {"metadata": {"run": "7"}, "prompt_cache_key": "x", "safety_identifier": ""},
        {"frequency_penalty": 0, "presence_penalty": 0.0},
        {"response_format": {"type": "text"}},
        {"ignore_eos": False},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False, "continuous_usage_stats": False}},
        {"stream_options": {"include_obfuscation": False}},
        {"seed": None, "suffix": None, "temperature": None, "stream_options": None},
    ],
)
def test_honoured_fields_can_ask_for_nothing_too(service: Service, body: dict[str, Any]) -> None:
    assert complete(service, **body) == complete(service)


def test_all_tokens_are_asked_for_by_0_or_by_minus_1(service: Service) -> None:
    assert complete(service, top_k=-1) == complete(service, top_k=0)
    assert complete(service, top_k=-1).request.sampling.top_k == 0
    assert complete(service).request.sampling.top_k == 7  # the artifact's


def test_messages_that_a_client_got_can_be_sent_back(service: Service) -> None:
    said = {"role": "assistant", "content": "c"}
    rest = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    more = {"tool_calls": [], "reasoning_content": ""}
    for sent in (said | rest, said | more, said | rest | {"tool_calls": None}):
        assert chat(service, messages=[*HELLO, sent]) == chat(service, messages=[*HELLO, said])


def test_json_values_that_are_the_same() -> None:
    for first, second in ((1, 1.0), ("a", "a"), ([], []), (False, False), ({}, {})):
        assert same(first, second)
    for first, second in ((0, False), (1, True), ("", []), ([], {}), (0, ""), (None, False)):
        assert not same(first, second)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a").path
    with serving_small(folder) as found:
        yield found


def test_a_token_of_the_request_ends_the_reply(served: Served) -> None:
    asked = {"prompt": "Hello", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    whole = served.complete(**asked, trace=True)["choices"][0]
    assert whole["finish_reason"] == "length"
    tokens = whole["trace"]["tokens"]
    place = next(at for at in range(3, 20) if tokens[at] not in tokens[:at])
    reply = served.complete(**asked, stop_token_ids=[tokens[place]], trace=True)
    (short,) = reply["choices"]
    assert short["finish_reason"] == "stop"
    assert short["trace"]["tokens"] == tokens[: place + 1]
    assert whole["text"].startswith(short["text"])
    assert reply["usage"]["completion_tokens"] == place + 1


def test_a_stream_can_tell_its_usage_with_each_part(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = served.events(prompt="Hello", max_tokens=5, ignore_eos=True, stream_options=options)
    *parts, last, _ = events
    counts = [each["usage"]["completion_tokens"] for each in parts]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 5
    assert {each["usage"]["prompt_tokens"] for each in parts} == {5}


def test_the_page_of_fields_follows_from_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = runpy.run_path(str(ROOT / "docs" / "fields_reference.py"))
    assert module["reference"]() == (ROOT / "docs" / "fields.md").read_text("utf-8"), "make docs"
    monkeypatch.setattr("sys.argv", ["fields_reference.py", "--check"])
    assert module["main"]() == 0
