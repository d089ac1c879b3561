"""Models that reason: in chats, responses and messages, whole and streamed; forms and tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.server.service import Service
from edge_memllm.text.chat import ChatTemplate
from support.checkpoints import EOS
from support.server import (
    HELLO,
    Served,
    chat,
    message,
    refusal,
    respond,
    serving_small,
)
from support.small_model import ScriptedRuntime, byte_tokenizer, write_small_artifact

ROOM = 2048
# As Qwen 3 and DeepSeek R1 do it: told whether to reason, it leaves it open or opens it itself.
SOURCE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}[assistant]"
    "{% if enable_thinking is defined %}{{ '<think>' if enable_thinking else '<think></think>' }}"
    "{% endif %}"
)
TEMPLATE = ChatTemplate(SOURCE, {})
ANSWER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
THOUGHT = "<think>\nHm <tool_call> {\n</think>\n\n"


@pytest.fixture(scope="module")
def runtime() -> ScriptedRuntime:
    return ScriptedRuntime([], context=ROOM)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, runtime: ScriptedRuntime) -> Iterator[Served]:
    folder: Path = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a", ROOM).path
    with serving_small(folder, runtime, template=TEMPLATE, engine={"slots": 1}) as found:
        yield found


def says(served: Served, runtime: ScriptedRuntime, read: Any, text: str, **body: Any) -> None:
    """Let the reply to a request want to be `text`."""
    (prompt,) = read(served.service, **body).prompts
    runtime.prompt_length = len(prompt)
    runtime.script = [*byte_tokenizer().encode(text, special=False), EOS]


def chatted(served: Served, runtime: ScriptedRuntime, text: str, **body: Any) -> dict[str, Any]:
    says(served, runtime, chat, text, **body)
    reply = served.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 200, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_chat_tells_reasoning_apart(served: Served, runtime: ScriptedRuntime) -> None:
    reply = chatted(served, runtime, "<think>\nHm.\n</think>\n\nSo.")
    found = reply["choices"][0]["message"]
    assert (found["reasoning_content"], found["content"]) == ("Hm.", "So.")
    tokens = reply["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert tokens == len("<think>\nHm.\n</think>") - len("<think>") + 1
    opened = chatted(served, runtime, "Hm.</think>So.", reasoning_effort="high")
    message = opened["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "So.")
    plain = chatted(served, runtime, "So.")["choices"][0]["message"]
    assert "reasoning_content" not in plain
    whole = chatted(served, runtime, "<think>a</think>b", reasoning_format="none")
    assert whole["choices"][0]["message"]["content"] == "<think>a</think>b"
    cut = chatted(served, runtime, "<think>never ends", max_tokens=9)["choices"][0]
    assert cut["finish_reason"] == "length"
    assert (cut["message"]["reasoning_content"], cut["message"]["content"]) == ("ne", "")


def test_a_stream_of_a_chat_has_reasoning_first(served: Served, runtime: ScriptedRuntime) -> None:
    says(served, runtime, chat, THOUGHT + "So.")
    parts = served.events("/v1/chat/completions", messages=HELLO, max_tokens=200)[:-1]
    deltas = [part["choices"][0]["delta"] for part in parts]
    thought = [each["reasoning_content"] for each in deltas if "reasoning_content" in each]
    said = [each["content"] for each in deltas if each.get("content")]
    assert "".join(thought) == "Hm <tool_call> {"
    assert "".join(said) == "So."
    assert len(thought) > 5
    order = ["reasoning_content" in each for each in deltas[1:-1]]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("effort", [None, "high"])
def test_calls_are_looked_for_behind_the_reasoning(
    served: Served, runtime: ScriptedRuntime, effort: str | None
) -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    text = THOUGHT.removeprefix("<think>") if effort else THOUGHT
    body = {"tools": [TOOL], **({} if effort is None else {"reasoning_effort": effort})}
    choice = chatted(served, runtime, text + call, **body)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "Hm <tool_call> {"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "now"
    none = chatted(served, runtime, call, **body)["choices"][0]
    assert ("tool_calls" in none["message"]) == (effort is None)  # else it is all reasoning


@pytest.mark.parametrize("needed", ["form", "tool"])
def test_a_form_holds_behind_what_the_prompt_has_opened(
    served: Served, runtime: ScriptedRuntime, needed: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER}}
    asked: dict[str, Any] = {"response_format": form}
    if needed == "tool":
        asked = {"tools": [TOOL], "tool_choice": "required"}
    free = chatted(served, runtime, "I think</think>no JSON", **asked, reasoning_effort="low")
    message = free["choices"][0]["message"]
    assert message["reasoning_content"] == "I think"
    if needed == "form":
        assert json.loads(message["content"])["a"] is not None
    else:
        assert message["tool_calls"][0]["function"]["name"] == "now"


def test_a_message_has_a_block_of_thinking(served: Served, runtime: ScriptedRuntime) -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 200,
        "thinking": {"type": "enabled", "budget_tokens": 99},
    }
    says(served, runtime, message, "Hm.</think>So.", thinking=body["thinking"])
    blocks = served.post("/v1/messages", body).json()["content"]
    assert blocks == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "So."},
    ]
    told = served.events("/v1/messages", **body)
    begun = [each["content_block"]["type"] for each in told if "content_block" in each]
    assert begun == ["thinking", "text"]
    kinds = [each["delta"]["type"] for each in told if each["type"] == "content_block_delta"]
    assert [*dict.fromkeys(kinds)] == ["thinking_delta", "signature_delta", "text_delta"]
    again = [*HELLO, {"role": "assistant", "content": blocks}, *HELLO]
    (prompt,) = message(served.service, messages=again).prompts
    text = served.service.model.tokenizer.decode(prompt)
    assert text == "[user]Hi[assistant]<think>Hm.</think>So.[user]Hi[assistant]"


def test_a_response_has_an_item_of_reasoning(served: Served, runtime: ScriptedRuntime) -> None:
    body = {"input": "Hi", "max_output_tokens": 200, "reasoning": {"effort": "high"}}
    says(served, runtime, respond, "Hm.</think>So.", reasoning=body["reasoning"])
    reply = served.post("/v1/responses", body).json()
    thought, said = reply["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert said["content"][0]["text"] == "So."
    assert reply["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    told = served.events("/v1/responses", **body)
    deltas = [each["delta"] for each in told if each["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Hm."
    assert [each["type"] for each in told[-1]["response"]["output"]] == ["reasoning", "message"]
    again = [{"role": "user", "content": "Hi"}, thought, said, {"role": "user", "content": "Hi"}]
    (prompt,) = respond(served.service, input=again).prompts
    text = served.service.model.tokenizer.decode(prompt)
    assert text == "[user]Hi[assistant]<think>Hm.</think>So.[user]Hi[assistant]"


def test_a_history_gives_its_reasoning_to_the_template(served: Served) -> None:
    for name in ("reasoning_content", "reasoning"):
        before = {"role": "assistant", "content": "So.", name: "Hm."}
        (prompt,) = chat(served.service, messages=[*HELLO, before, *HELLO]).prompts
        assert "<think>Hm.</think>So." in served.service.model.tokenizer.decode(prompt)


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (chat, {"reasoning_effort": "huge"}, "reasoning_effort"),
        (chat, {"reasoning_format": "xml"}, "reasoning_format"),
        (respond, {"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        (respond, {"reasoning": {"summary": "none"}}, "reasoning.summary"),
        (message, {"thinking": {"type": "huge"}}, "thinking.type"),
        (message, {"thinking": {"budget_tokens": 5}}, "thinking.type"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    served: Served, read: Any, body: Any, param: str
) -> None:
    assert refusal(read, served.service, **body).param == param


def test_a_model_that_does_not_reason_is_not_asked_to(service: Service) -> None:
    assert refusal(chat, service, reasoning_effort="high").param == "reasoning_effort"
    assert refusal(respond, service, reasoning={"effort": "high"}).param == "reasoning"
    thinking = {"type": "enabled", "budget_tokens": 1024}
    assert refusal(message, service, thinking=thinking).param == "thinking"
    assert chat(service, reasoning_effort="none") == chat(service)


def test_a_message_of_calls_alone_has_a_text_for_the_template(served: Served) -> None:
    """As in Qwen 3's template, which asks for `content` of every message."""
    service, source = (
        served.service,
        "{% for m in messages %}{{ m.content + '|' }}{% endfor %}tools",
    )
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "noon"}
    own = service.template
    try:
        service.template = ChatTemplate("{{ tools }}" + source, {})
        for content in ({}, {"content": None}, {"content": ""}):
            before = {"role": "assistant", "tool_calls": [call], **content}
            (prompt,) = chat(service, messages=[*HELLO, before, result], tools=[TOOL]).prompts
            assert service.model.tokenizer.decode(prompt).endswith("Hi||noon|tools")
    finally:
        service.template = own


@pytest.mark.parametrize(("usual", "end"), [("on", "<think>"), ("off", "<think></think>")])
def test_a_server_says_whether_to_reason_where_requests_do_not(
    tmp_path: Path, runtime: ScriptedRuntime, usual: str, end: str
) -> None:
    folder = write_small_artifact(tmp_path / "a", ROOM).path
    with serving_small(folder, runtime, template=TEMPLATE, reasoning=usual) as found:
        body = {"messages": HELLO}
        usually = found.post("/apply-template", body).json()["prompt"]
        assert usually.endswith(f"[assistant]{end}")
        other = {"enable_thinking": usual == "off"}
        asked = found.post("/apply-template", {**body, "chat_template_kwargs": other}).json()
        assert asked["prompt"].endswith("<think>") == (usual == "off")
        (prompt,) = chat(found.service, reasoning_effort="none").prompts
        assert found.service.model.tokenizer.decode(prompt).endswith("</think>")


def test_what_a_template_always_opens_is_closed(service: Service) -> None:
    before = service.template
    source = SOURCE.partition("{% if enable_thinking is")[0] + "{{ '<think>\\n' }}"
    try:
        service.template = ChatTemplate(source, {})
        read = chat(service, reasoning_effort="none")
        text = service.model.tokenizer.decode(read.prompts[0])
        assert text.endswith("[assistant]<think>\n</think>")
        assert read.reasoning is not None
        assert not read.reasoning.begun
    finally:
        service.template = before
