"""Requests of every protocol that the server speaks, streamed or not, and what they reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.over_http.program import PATIENCE

Body = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One way to ask."""

    path: str
    body: Callable[[str, int], Body]  # of a text and the most tokens
    whole: Callable[[Any], str]  # the text of a reply
    part: Callable[[Any], str]  # that of an event of a stream


def _completion(text: str, tokens: int) -> Body:
    return {"prompt": text, "max_tokens": tokens, "temperature": 0}


def _chat(text: str, tokens: int) -> Body:
    return {**_messages(text, tokens), "logprobs": False}


def _response(text: str, tokens: int) -> Body:
    return {"input": text, "max_output_tokens": tokens, "temperature": 0}


def _messages(text: str, tokens: int) -> Body:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0}


def _output(reply: Any) -> str:
    return "".join(part["text"] for item in reply["output"] for part in item["content"])


KINDS: Mapping[str, Kind] = {
    "completions": Kind(
        "/v1/completions",
        _completion,
        lambda reply: str(reply["choices"][0]["text"]),
        lambda event: str(event["choices"][0]["text"]),
    ),
    "chat": Kind(
        "/v1/chat/completions",
        _chat,
        lambda reply: str(reply["choices"][0]["message"]["content"]),
        lambda event: str(event["choices"][0]["delta"].get("content") or ""),
    ),
    "responses": Kind(
        "/v1/responses",
        _response,
        _output,
        lambda event: str(event["delta"]) if event["type"] == "response.output_text.delta" else "",
    ),
    "messages": Kind(
        "/v1/messages",
        _messages,
        lambda reply: "".join(str(block["text"]) for block in reply["content"]),
        lambda event: str(event.get("delta", {}).get("text", "")),
    ),
}


def ask(url: str, kind: str, model: str, text: str, tokens: int, *, stream: bool) -> str:
    """Ask for a greedy reply and return its text. Raises for what is no reply."""
    way = KINDS[kind]
    body = {"model": model, "stream": stream, **way.body(text, tokens)}
    response = httpx.post(url + way.path, json=body, timeout=PATIENCE, verify=False)
    if response.status_code != httpx.codes.OK:
        raise RuntimeError(f"{way.path}: {response.status_code} {response.text}")
    if not stream:
        return way.whole(response.json())
    return "".join(map(way.part, _events(response.text)))


def _events(text: str) -> Iterator[Any]:
    for line in text.splitlines():
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event and event["error"] is not None:
            raise RuntimeError(f"an error in a stream: {data}")
        yield event
