"""`/v1/responses`: OpenAI's own client, the order of its events, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from edge_memllm.server.service import Service
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import VOCABULARY
from support.server import MODEL_ID, TEMPLATE, Served, refusal, respond, serving_small
from support.small_model import write_small_artifact

ROOM = 4096
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "parameters": SCHEMA}
CALL = {
    "type": "function_call",
    "call_id": "c1",
    "name": "weather",
    "arguments": '{"city": "Rome"}',
}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "hot"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a", ROOM).path
    with serving_small(folder, FakeRuntime(VOCABULARY, ROOM), template=TEMPLATE) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with served.openai() as found:
        yield found


def asked(served: Served, **body: Any) -> dict[str, Any]:
    response = served.post("/v1/responses", {"input": "Hi", "max_output_tokens": 100, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_response_is_the_chats_text(served: Served, client: OpenAI) -> None:
    found = client.responses.create(
        model=MODEL_ID, input="Hi", instructions="Be brief.", max_output_tokens=9, temperature=0
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    body = {"messages": messages, "max_tokens": 9, "temperature": 0}
    chat = served.post("/v1/chat/completions", body).json()
    assert found.output_text == chat["choices"][0]["message"]["content"]
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.instructions == "Be brief."
    assert found.usage is not None
    assert found.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert found.usage.output_tokens == 9
    (item,) = found.output
    assert (item.type, item.status) == ("message", "incomplete")


def test_a_function_is_called_and_its_output_goes_back(client: OpenAI) -> None:
    choice = {"type": "function", "name": "weather"}
    found = client.responses.create(
        model=MODEL_ID,
        input="Hi",
        tools=[WEATHER],
        tool_choice=choice,
        max_output_tokens=100,
        extra_body={"seed": 1},
    )
    assert found.status == "completed"
    (call,) = found.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "hot"}
    again = client.responses.create(
        model=MODEL_ID,
        input=[{"role": "user", "content": "Hi"}, *found.output, output],
        tools=[WEATHER],
        max_output_tokens=4,
    )
    assert again.output


def test_output_by_a_schema(client: OpenAI) -> None:
    class Answer(BaseModel):
        colour: Literal["red", "blue"]

    found = client.responses.parse(
        model=MODEL_ID, input="Hi", text_format=Answer, max_output_tokens=60
    )
    assert found.output_parsed is not None
    assert found.output_parsed.colour in ("red", "blue")


TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
CALL_EVENTS = [
    *TEXT_EVENTS[:3],
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ({"max_output_tokens": 6, "ignore_eos": True}, [*TEXT_EVENTS, "response.incomplete"]),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}},
            [*CALL_EVENTS, "response.completed"],
        ),
    ],
)
def test_a_stream_has_openais_events_in_their_order(
    served: Served, body: dict[str, Any], kinds: list[str]
) -> None:
    body = {"input": "Hi", "max_output_tokens": 100, "seed": 2, **body}
    events = served.events("/v1/responses", **body)
    assert list(dict.fromkeys(each["type"] for each in events)) == kinds
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert {each["output_index"] for each in events if "output_index" in each} == {0}
    last = events[-1]["response"]
    deltas = "".join(each["delta"] for each in events if each["type"].endswith(".delta"))
    whole = asked(served, **body)
    if "tools" in body:
        assert deltas == last["output"][0]["arguments"] == whole["output"][0]["arguments"]
    else:
        assert deltas == last["output"][0]["content"][0]["text"]
        assert deltas == whole["output"][0]["content"][0]["text"]
    assert (last["status"], last["usage"]["output_tokens"]) == (
        whole["status"],
        whole["usage"]["output_tokens"],
    )
    assert events[0]["response"]["output"] == []


def test_the_client_builds_the_same_from_a_stream(client: OpenAI) -> None:
    with client.responses.stream(
        model=MODEL_ID,
        input="Hi",
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "weather"},
    ) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_response().output
    assert call.type == "function_call"


def test_the_client_reads_a_stream_that_is_cut_off_to_its_end(client: OpenAI) -> None:
    """Its `get_final_response` knows `response.completed` alone, so the last event is looked at."""
    asked: dict[str, Any] = {"model": MODEL_ID, "input": "Hi", "max_output_tokens": 5}
    with client.responses.stream(**asked, extra_body={"ignore_eos": True}) as stream:
        events = list(stream)
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.status == "incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"
    said = [each.delta for each in events if each.type == "response.output_text.delta"]
    assert last.response.output_text == "".join(said) != ""


def prompt_of(service: Service, **body: Any) -> str:
    (prompt,) = respond(service, **body).prompts
    return service.model.tokenizer.decode(prompt)


def test_items_become_messages(served: Served) -> None:
    user = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    said = {
        "type": "message",
        "id": "msg_1",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
    }
    assert prompt_of(served.service, input=[user, said, CALL, OUTPUT]) == (
        '[user]Hi[assistant]I look.\n{"name": "weather", "arguments": {"city": "Rome"}}'
        "[user]Result of weather: hot[assistant]"
    )


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": None}, "input", "is missing"),
        ({"input": []}, "input", "expected a text, or a list"),
        ({"input": [{}]}, "input[0].type", "is null, expected message, function_call"),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "input[0].type",
            "Give the item itself",
        ),
        ({"input": [{"role": "boss", "content": "x"}]}, "input[0].role", 'is "boss"'),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "parts of text only",
        ),
        ({"input": [OUTPUT]}, "input[0].call_id", "no item before it is a call of that id"),
        (
            {"input": [{**CALL, "arguments": "{"}]},
            "input[0].arguments",
            "expected the text of a JSON",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "run it yourself"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice", "expected 'none', 'auto'"),
        ({"store": True}, "store", "replies are not stored"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "the whole conversation"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", 'is "xml"'),
        ({"text": {"format": {"type": "json_schema", "name": ""}}}, "text.format.name", "1 to 64"),
        ({"n": 2}, "n", "no parameter"),
        ({"messages": []}, "messages", "no parameter"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    service: Service, body: dict[str, Any], param: str, message: str
) -> None:
    error = refusal(respond, service, **body)
    assert error.param == param
    assert any(each in str(error) for each in message.split("|"))


def test_an_error_is_the_clients(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="replies are not stored"):
        client.responses.create(model=MODEL_ID, input="x", previous_response_id="resp_1")


def test_input_tokens_are_counted(served: Served, client: OpenAI) -> None:
    counted = client.responses.input_tokens.count(model=MODEL_ID, input="Hi")
    assert counted.input_tokens == asked(served, max_output_tokens=1)["usage"]["input_tokens"]


def test_likelihoods_of_a_response(served: Served) -> None:
    body = {"temperature": 0, "max_output_tokens": 5, "ignore_eos": True}
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = asked(served, **body, **wanted)["output"][0]["content"]
    assert len(part["logprobs"]) == 5
    for each in part["logprobs"]:
        assert {*each} == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(each["top_logprobs"]) == 2
        assert each["logprob"] == pytest.approx(each["top_logprobs"][0]["logprob"])
    told = served.events("/v1/responses", input="Hi", **body, **wanted)
    deltas = [each for each in told if each["type"] == "response.output_text.delta"]
    streamed = [score["token"] for each in deltas for score in each["logprobs"]]
    assert streamed == [each["token"] for each in part["logprobs"]]
    (done,) = (each for each in told if each["type"] == "response.output_text.done")
    assert len(done["logprobs"]) == 5
    (whole,) = told[-1]["response"]["output"][0]["content"]
    assert whole["logprobs"] == part["logprobs"]
    assert told[-1]["response"]["top_logprobs"] == 2
    (plain,) = asked(served, **body)["output"][0]["content"]
    assert plain["logprobs"] == []
    (own,) = asked(served, **body, include=wanted["include"])["output"][0]["content"]
    assert [each["top_logprobs"] for each in own["logprobs"]] == [[]] * 5


def test_a_stream_tells_progress_and_times(served: Served) -> None:
    body = {"input": "Hi", "max_output_tokens": 5, "ignore_eos": True}
    told = served.events("/v1/responses", **body, return_progress=True, timings_per_token=True)
    progress = [each for each in told if "prompt_progress" in each]
    assert {each["type"] for each in progress} == {"response.in_progress"}
    last = progress[-1]["prompt_progress"]
    assert last["processed"] == last["total"] > 0
    deltas = [each for each in told if each["type"] == "response.output_text.delta"]
    assert all(each["timings"]["predicted_n"] for each in deltas)
    assert told[-1]["timings"]["predicted_n"] == 5
    plain = served.events("/v1/responses", **body)
    assert not [each for each in plain if {"timings", "prompt_progress"} & {*each}]
