"""Replies of `/v1/messages`: blocks of text and of the use of tools, and the events of a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from edge_memllm.server.calls import Call
from edge_memllm.server.fields import ApiError
from edge_memllm.server.reply_format import Addition, CallPiece, Content, Json, event
from edge_memllm.server.service import Service

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


def message_error(error: ApiError) -> Json:
    """Return an error as Anthropic's clients read it."""
    told = error.body()["error"]
    kind = _KINDS.get(error.status, "invalid_request_error")
    body = {"type": kind, "message": told["message"], "param": told["param"], "code": told["code"]}
    return {"type": "error", "error": body, "request_id": told["request_id"]}


def error_response(error: ApiError) -> Response:
    """Return an error as a response."""
    return JSONResponse(message_error(error), error.status, error.headers)


class MessageWriter:
    """Writes one reply, whole or as events."""

    def __init__(self, service: Service, call: Call) -> None:
        self._service = service
        self._call = call
        self._id = f"msg_{uuid.uuid4().hex}"
        self._blocks = 0  # that have begun
        self._open: CallPiece | str | None = None  # the block that may go on, of text or a call
        self._content = Content()  # what is told of it at the end

    def whole(self, contents: Sequence[Content], usage: Json) -> Json:
        """Return the complete reply."""
        (content,) = contents
        blocks: list[Json] = [_thinking_block(content.reasoning)] if content.reasoning else []
        blocks += [_text_block(content.text)] if content.text else []
        blocks += [_tool_block(call, _input(call)) for call in content.calls]
        return self._message(blocks, content, _usage(usage))

    def events(self, addition: Addition, usage: Json | None) -> Iterator[bytes]:
        """Yield what begins the message, if this does, and what an addition does to blocks."""
        if addition.first:
            tokens = sum(map(len, self._call.prompts))
            begun = self._message([], Content(), _usage({"prompt_tokens": tokens}))
            yield _event("message_start", message=begun)
        part = addition.part
        if part.reasoning:
            if self._open != "thinking":
                yield from self._begin(_thinking_block(""), "thinking")
            yield self._delta({"type": "thinking_delta", "thinking": part.reasoning})
        if part.text:
            if self._open != "text":
                yield from self._begin(_text_block(""), "text")
            yield self._delta({"type": "text_delta", "text": part.text})
        for call in part.calls:
            if call.name is not None:
                yield from self._begin(_tool_block(call, {}), call)
            if call.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        if part.reason is not None:
            self._content.reason, self._content.stopped_by = part.reason, part.stopped_by
            yield from self._stop()

    def ending(self, usage: Json) -> Iterator[bytes]:
        """Yield why the message ends and what it took."""
        told = self._message([], self._content, {})
        delta = {name: told[name] for name in ("stop_reason", "stop_sequence")}
        yield _event("message_delta", delta=delta, usage=_usage(usage))
        yield _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        """Return the event that says what went wrong."""
        return b"event: error\n" + event(message_error(error))

    def _begin(self, block: Json, opened: CallPiece | str) -> Iterator[bytes]:
        yield from self._stop()
        yield _event("content_block_start", index=self._blocks, content_block=block)
        self._blocks += 1
        self._open = opened

    def _stop(self) -> Iterator[bytes]:
        if self._open == "thinking":  # clients wait for one; nothing is signed here
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open is not None:
            yield _event("content_block_stop", index=self._blocks - 1)
        self._open = None

    def _delta(self, delta: Json) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _message(self, blocks: list[Json], content: Content, usage: Json) -> Json:
        reason = None if content.reason is None else _REASONS[content.reason]
        sequence = content.stopped_by if reason == "end_turn" else None
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._service.settings.model_id,
            "content": blocks,
            "stop_reason": reason if sequence is None else "stop_sequence",
            "stop_sequence": sequence,
            "usage": usage,
        }


def _thinking_block(text: str) -> Json:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _text_block(text: str) -> Json:
    return {"type": "text", "text": text}


def _tool_block(call: CallPiece, arguments: Json) -> Json:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _input(call: CallPiece) -> Json:
    """Return the arguments of a call; what was cut off is no object, and is left out."""
    try:
        found = json.loads(call.arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\n" + event({"type": kind, **fields})


def _usage(usage: Json) -> Json:
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens", 0),
    }
