"""The real `openai` client against the server: models, completions, chat, streams, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

import edge_memllm
from edge_memllm import Model, Sampling
from edge_memllm.sampling import next_token_losses
from support.checkpoints import MakeArtifact
from support.server import MODEL_ID, TEMPLATE, Served, serving

GREEDY = Sampling()
PROMPT = "The river"


@pytest.fixture(scope="module")
def model(make_artifact: MakeArtifact) -> Iterator[Model]:
    with edge_memllm.load(
        make_artifact(graph_weights="fp32", table_codec="f32"), threads=1
    ) as found:
        yield found


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with serving(model, template=TEMPLATE) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with served.openai() as found:
        yield found


def test_models(client: OpenAI) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == (MODEL_ID, "model", "edge-memllm")
    assert client.models.retrieve(MODEL_ID) == listed
    with pytest.raises(openai.NotFoundError, match=r'"gpt-9" here\. This server has "small"'):
        client.models.retrieve("gpt-9")


def test_a_completion_is_what_the_model_writes(client: OpenAI, model: Model) -> None:
    reply = client.completions.create(
        model=MODEL_ID, prompt=PROMPT, max_tokens=12, temperature=0, seed=5
    )
    expected = model.generate(PROMPT, max_new_tokens=12, sampling=GREEDY)
    assert reply.choices[0].text == expected
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (9, 12)
    assert reply.usage.total_tokens == 21


def test_sampling_is_what_the_model_does_with_the_same_seed(client: OpenAI, model: Model) -> None:
    reply = client.completions.create(
        model=MODEL_ID,
        prompt=PROMPT,
        max_tokens=20,
        temperature=0.7,
        top_p=0.8,
        seed=11,
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.3},
    )
    sampling = Sampling(0.7, top_k=20, top_p=0.8, min_p=0.01, repetition_penalty=1.3)
    assert reply.choices[0].text == model.generate(
        PROMPT, max_new_tokens=20, sampling=sampling, seed=11
    )


def test_a_list_of_prompts_texts_or_tokens(client: OpenAI, model: Model) -> None:
    texts = client.completions.create(
        model=MODEL_ID, prompt=["A", "B"], max_tokens=5, temperature=0, n=2
    )
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    expected = [model.generate(each, max_new_tokens=5, sampling=GREEDY) for each in "AABB"]
    assert [choice.text for choice in texts.choices] == expected
    ids = client.completions.create(
        model=MODEL_ID, prompt=[model.tokenize("A")], max_tokens=5, temperature=0
    )
    assert ids.choices[0].text == expected[0]
    alone = client.completions.create(
        model=MODEL_ID, prompt=model.tokenize("B"), max_tokens=5, temperature=0
    )
    assert alone.choices[0].text == expected[2]


def test_a_stream_makes_the_same_text(client: OpenAI, model: Model) -> None:
    stream = client.completions.create(
        model=MODEL_ID, prompt=PROMPT, max_tokens=12, temperature=0, stream=True
    )
    with stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == model.generate(
        PROMPT, max_new_tokens=12, sampling=GREEDY
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_likelihoods_of_prompt_and_reply(client: OpenAI, model: Model) -> None:
    reply = client.completions.create(
        model=MODEL_ID, prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    choice = reply.choices[0]
    assert choice.text.startswith(PROMPT)
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert len(found.tokens) == 12
    assert found.tokens[:9] == list(PROMPT)
    assert found.text_offset[:9] == list(range(9))
    assert found.token_logprobs[0] is None
    ids = model.tokenize(PROMPT)
    from edge_memllm.engine.feeding import Feeder

    with Feeder(model.runtime, model.table, 1, 128) as feeder:
        losses = next_token_losses(feeder.score(0, ids)[:-1].astype(np.float32), ids[1:])
    assert np.allclose(found.token_logprobs[1:9], -losses, atol=1e-5)
    for token, value, top in zip(
        found.tokens[9:], found.token_logprobs[9:], found.top_logprobs[9:], strict=True
    ):
        assert top[token] == value == max(top.values())  # greedy
        assert len(top) == 2


def test_only_the_prompt_is_scored_where_no_token_is_wanted(client: OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL_ID, prompt=PROMPT, max_tokens=0, logprobs=0, echo=True
    )
    assert reply.choices[0].text == PROMPT
    assert reply.choices[0].finish_reason == "length"
    assert len(reply.choices[0].logprobs.token_logprobs) == 9
    assert reply.usage.completion_tokens == 0


def test_stop_bias_and_penalties(client: OpenAI, model: Model) -> None:
    plain = client.completions.create(model=MODEL_ID, prompt="x", max_tokens=30, temperature=0)
    letter = plain.choices[0].text[3]
    stopped = client.completions.create(
        model=MODEL_ID, prompt="x", max_tokens=30, temperature=0, stop=[letter, "\x00never"]
    )
    assert stopped.choices[0].text == plain.choices[0].text.partition(letter)[0]
    assert stopped.choices[0].finish_reason == "stop"
    (token,) = model.tokenize("z")
    forced = client.completions.create(
        model=MODEL_ID, prompt="x", max_tokens=4, temperature=0, logit_bias={str(token): 100}
    )
    assert forced.choices[0].text == "zzzz"
    varied = client.completions.create(
        model=MODEL_ID,
        prompt="x",
        max_tokens=4,
        temperature=0,
        logit_bias={str(token): 9},
        presence_penalty=2,
        frequency_penalty=2,
    )
    assert varied.choices[0].text != "zzzz"


def test_chat(client: OpenAI, model: Model) -> None:
    reply = client.chat.completions.create(
        model=MODEL_ID,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ],
        max_completion_tokens=7,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    prompt = model.tokenizer.encode("[system]Be brief.[user]Hi[assistant]", special=False)
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == model.generate(prompt, max_new_tokens=7, sampling=GREEDY)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 7
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob
    spelled = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert spelled.decode(errors="replace") == choice.message.content


def test_a_chat_stream_with_usage(client: OpenAI) -> None:
    wanted = {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hi"}]}
    plain = client.chat.completions.create(**wanted, max_tokens=9, temperature=0)
    stream = client.chat.completions.create(
        **wanted, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    with stream:
        first, *middle, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in middle)
    assert text == plain.choices[0].message.content
    assert middle[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 9


class Person(BaseModel):
    name: str
    age: int
    tags: list[str]


def test_json_by_a_schema(client: OpenAI) -> None:
    """A random network writes valid JSON, and the client parses it into the class."""
    digits = {"type": "string", "pattern": "^[0-9]{3}$"}
    schema = {
        "type": "object",
        "properties": {"code": digits, "kind": {"enum": ["a", "b"]}, "on": {"type": "boolean"}},
        "required": ["code", "kind", "on"],
        "additionalProperties": False,
    }
    for seed in range(5):
        reply = client.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "Hi"}],
            temperature=1,
            seed=seed,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": schema, "strict": True},
            },
        )
        assert reply.choices[0].finish_reason == "stop"
        found = json.loads(reply.choices[0].message.content or "")
        assert len(found["code"]) == 3
        assert found["code"].isdigit()
        assert found["kind"] in ("a", "b")
        assert isinstance(found["on"], bool)


def test_the_clients_own_classes_become_a_schema(client: OpenAI) -> None:
    """Strings are free, so a random network may go on until its tokens are used up."""
    try:
        parsed = client.chat.completions.parse(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "Hi"}],
            response_format=Person,
            temperature=0.3,
            seed=3,
            logit_bias={"1": 8},  # quotation marks, so that strings end
            max_tokens=400,
        )
    except openai.LengthFinishReasonError as error:
        text = error.completion.choices[0].message.content or ""
        assert text.startswith('{"name": "')
    else:
        assert isinstance(parsed.choices[0].message.parsed, Person)


def test_errors_are_those_of_the_client(client: OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature is 3") as refused:
        client.completions.create(model=MODEL_ID, prompt="x", temperature=3)
    assert refused.value.param == "temperature"
    assert refused.value.code == "invalid_value"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="no model") as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="audio is not supported") as audio:
        client.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "x"}],
            audio={"format": "wav", "voice": "alloy"},
        )
    assert audio.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="resulted in 600 tokens") as long:
        client.completions.create(model=MODEL_ID, prompt="x" * 600)
    # What litellm and langchain-openai look for.
    assert "This model's maximum context length is 512 tokens" in str(long.value)
    assert "prompt is too long" in str(long.value)
    assert long.value.code == "context_length_exceeded"


def test_a_tool_is_called(client: OpenAI) -> None:
    class Weather(BaseModel):
        at: Literal["Bonn", "Rome"]

    asked: dict[str, Any] = {
        "model": MODEL_ID,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [openai.pydantic_function_tool(Weather)],
        "max_tokens": 80,
        "temperature": 0,
    }
    named = {"type": "function", "function": {"name": "Weather"}}
    parsed = client.chat.completions.parse(**asked, tool_choice=named).choices[0]
    assert parsed.finish_reason == "tool_calls"
    (call,) = parsed.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**asked, tool_choice=named) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    assert streamed.function.arguments == call.function.arguments
    history = [
        *asked["messages"],
        parsed.message,
        {"role": "tool", "tool_call_id": call.id, "content": "hot"},
    ]
    said = client.chat.completions.create(
        model=MODEL_ID, messages=history, max_tokens=3, temperature=0
    )
    assert said.choices[0].message.content


def test_the_asynchronous_client(served: Served, model: Model) -> None:
    import asyncio

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
            asked = [
                client.completions.create(model=MODEL_ID, prompt=each, max_tokens=6, temperature=0)
                for each in "ABCDEFGH"
            ]
            return [reply.choices[0].text for reply in await asyncio.gather(*asked)]

    expected = [model.generate(each, max_new_tokens=6, sampling=GREEDY) for each in "ABCDEFGH"]
    assert asyncio.run(ask()) == expected
