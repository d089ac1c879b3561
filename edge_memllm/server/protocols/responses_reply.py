"""Replies of `/v1/responses`: items, and the typed events that build them up, in OpenAI's order."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from edge_memllm.server.calls import Call
from edge_memllm.server.fields import ApiError
from edge_memllm.server.protocols.timings import progress_of
from edge_memllm.server.reply_format import (
    Addition,
    CallPiece,
    Content,
    Json,
    chat_scores,
    event,
)
from edge_memllm.server.service import Service

Kind: TypeAlias = Literal["reasoning", "message", "function_call"]
_PREFIXES: Mapping[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class ResponseWriter:
    """Writes one reply, whole or as events."""

    def __init__(self, service: Service, call: Call) -> None:
        self._head: Json = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": service.now(),
            "model": service.settings.model_id,
            "background": False,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **call.repeated,
        }
        self._service = service
        self._told = call.timings
        self._timings: Json | None = None
        self._events = 0
        self._items: list[_Item] = []
        self._pending: list[Json] = []  # likelihoods of tokens whose text has not come
        self._reason: str | None = None

    def whole(self, contents: Sequence[Content], usage: Json) -> Json:
        """Return the complete reply."""
        (content,) = contents
        if content.reasoning:
            self._items.append(_Item("reasoning", text=content.reasoning))
        if content.text or not (content.calls or content.reasoning):
            logprobs = self._logprobs(content)
            self._items.append(_Item("message", text=content.text, logprobs=logprobs))
        self._items += [_Item("function_call", call=call) for call in content.calls]
        self._reason = content.reason
        for item in self._items:
            item.end(self._reason)
        return self._response(usage)

    def events(self, addition: Addition, usage: Json | None) -> Iterator[bytes]:
        """Yield what begins the reply, if it is the first, and what an addition does to items."""
        if addition.first:
            for kind in ("created", "in_progress"):
                yield self._event(f"response.{kind}", response=self._response(None))
        part = addition.part
        self._timings = part.timings or self._timings
        if part.progress is not None:
            told = progress_of(part.progress)
            yield self._event(
                "response.in_progress",
                response=self._response(None),
                prompt_progress=told,
                **self._times(),
            )
        self._pending += self._logprobs(part)
        if part.reasoning:
            yield from self._add_reasoning(part.reasoning)
        if part.text:
            yield from self._add_text(part.text)
        for call in part.calls:
            yield from self._add_to_call(call)
        if part.reason is not None:
            self._reason = part.reason
            if not self._items:
                yield from self._begin(_Item("message"))
            yield from self._end_last()

    def ending(self, usage: Json) -> Iterator[bytes]:
        """Yield the whole reply, which ends the stream."""
        response = self._response(usage)
        yield self._event(f"response.{self._status}", response=response, **self._times())

    def failure(self, error: ApiError) -> bytes:
        """Return the event that says what went wrong."""
        told = error.body()["error"]
        return self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def _add_reasoning(self, text: str) -> Iterator[bytes]:
        if not self._items or self._items[-1].kind != "reasoning":
            yield from self._begin(_Item("reasoning"))
        item = self._items[-1]
        item.text += text
        self._pending = []  # of the answer's tokens alone is told how likely they were
        yield self._of_item("reasoning_text.delta", item, content_index=0, delta=text)

    def _add_text(self, text: str) -> Iterator[bytes]:
        if not self._items or self._items[-1].kind != "message":
            yield from self._begin(_Item("message"))
        item = self._items[-1]
        item.text += text
        item.logprobs += self._pending
        yield self._of_item(
            "output_text.delta",
            item,
            content_index=0,
            delta=text,
            logprobs=[_without_bytes(each) for each in self._pending],
            **self._times(),
        )
        self._pending = []

    def _add_to_call(self, piece: CallPiece) -> Iterator[bytes]:
        if piece.name is not None:
            call = CallPiece(piece.index, piece.id, piece.name)
            yield from self._begin(_Item("function_call", call=call))
        item = self._items[-1]
        assert item.call is not None
        if piece.arguments:
            item.call.arguments += piece.arguments
            yield self._of_item("function_call_arguments.delta", item, delta=piece.arguments)
        if piece.complete:
            item.call.complete = True
            yield from self._end_last()

    def _begin(self, item: _Item) -> Iterator[bytes]:
        yield from self._end_last()
        self._items.append(item)
        yield self._item_event("added")
        if item.call is None:
            part = item.part()
            yield self._of_item("content_part.added", item, content_index=0, part=part)

    def _end_last(self) -> Iterator[bytes]:
        """End the last item, unless it has ended."""
        item = self._items[-1] if self._items else None
        if item is None or item.ended:
            return
        item.end(self._reason)
        if item.kind == "reasoning":
            yield self._of_item("reasoning_text.done", item, content_index=0, text=item.text)
            yield self._of_item("content_part.done", item, content_index=0, part=item.part())
        elif item.call is None:
            part = item.part()
            shown = [_without_bytes(each) for each in item.logprobs]
            yield self._of_item(
                "output_text.done", item, content_index=0, text=item.text, logprobs=shown
            )
            yield self._of_item("content_part.done", item, content_index=0, part=part)
        else:
            name, arguments = item.call.name, item.call.arguments
            yield self._of_item(
                "function_call_arguments.done", item, name=name, arguments=arguments
            )
        yield self._item_event("done")

    def _item_event(self, what: str) -> bytes:
        place = len(self._items) - 1
        item = self._items[place].as_json()
        return self._event(f"response.output_item.{what}", output_index=place, item=item)

    def _of_item(self, kind: str, item: _Item, **fields: Any) -> bytes:
        place = self._items.index(item)
        return self._event(f"response.{kind}", item_id=item.id, output_index=place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return b"event: " + kind.encode() + b"\n" + event(value)

    def _times(self) -> Json:
        """Return what the reply took so far, where that is asked for."""
        return {"timings": self._timings} if self._told and self._timings is not None else {}

    def _logprobs(self, content: Content) -> list[Json]:
        """Return how likely each token was, where that was asked for."""
        found: list[Json] = chat_scores(content.scores, self._service.texts)["content"]
        return found

    @property
    def _status(self) -> str:
        if self._reason is None:
            return "in_progress"
        return "incomplete" if self._reason == "length" else "completed"

    def _response(self, usage: Json | None) -> Json:
        cut = self._reason == "length"
        return {
            **self._head,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [item.as_json() for item in self._items],
            "usage": None if usage is None else _usage(usage),
        }


class _Item:
    """Reasoning, a message, or a call."""

    def __init__(
        self,
        kind: Kind,
        *,
        text: str = "",
        call: CallPiece | None = None,
        logprobs: Sequence[Json] = (),
    ) -> None:
        self.text = text
        self.logprobs = list(logprobs)
        self.kind = kind
        self.call = call
        self.id = f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"
        self._status = "in_progress"

    @property
    def ended(self) -> bool:
        return self._status != "in_progress"

    def end(self, reason: str | None) -> None:
        """Note that nothing more comes of it."""
        cut = reason == "length" and (self.call is None or not self.call.complete)
        self._status = "incomplete" if cut else "completed"

    def part(self) -> Json:
        """Return the text so far, of reasoning or of a message."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return _text_part(self.text, self.logprobs)

    def as_json(self) -> Json:
        head = {"id": self.id, "status": self._status, "type": self.kind}
        if self.call is None:
            content = [self.part()] if self.ended else []
            own: Json = {"summary": []} if self.kind == "reasoning" else {"role": "assistant"}
            return {**head, **own, "content": content}
        call = {"call_id": self.call.id, "name": self.call.name, "arguments": self.call.arguments}
        return {**head, **call}


def _text_part(text: str, logprobs: Sequence[Json] = ()) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _without_bytes(score: Json) -> Json:
    """Return a likelihood as events have it."""
    top = [{key: each[key] for key in ("token", "logprob")} for each in score["top_logprobs"]]
    return {"token": score["token"], "logprob": score["logprob"], "top_logprobs": top}


def _usage(usage: Json) -> Json:
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    reasoned = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoned},
        "total_tokens": usage["total_tokens"],
    }
