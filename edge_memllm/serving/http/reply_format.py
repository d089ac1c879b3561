"""The shape of replies: what completions and chat have in common, and where they differ.

A reply is made of choices. The same classes write them whole, or in parts as they come.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.serving.http.call import Call
from edge_memllm.serving.http.service import Service
from edge_memllm.serving.http.token_scores import PlacedScore, chat_scores, completion_scores
from edge_memllm.serving.http.tracing import trace_of
from edge_memllm.serving.pieces import ChoiceStatistics, RecordUse

Json = dict[str, Any]


@dataclass(slots=True)
class Content:
    """What a choice holds, whole or in part; it is finished once there is a reason."""

    text: str = ""
    scores: list[PlacedScore] = field(default_factory=list)
    reason: str | None = None
    statistics: ChoiceStatistics | None = None
    tokens: list[int] = field(default_factory=list)
    records: list[RecordUse] = field(default_factory=list)


class ReplyFormat(Protocol):
    """How one kind of reply is written; `scored` says whether likelihoods were wished for."""

    prefix: str  # of its id
    whole_kind: str
    part_kind: str

    def whole(self, content: Content, scored: bool, texts: TokenTexts) -> Json:
        """Return the fields of a complete choice."""

    def opening(self) -> Json | None:
        """Return the fields that begin a choice in a stream, if something does."""

    def part(self, content: Content, scored: bool, texts: TokenTexts) -> Json:
        """Return the fields that add to a choice in a stream."""


class CompletionFormat:
    """`/v1/completions`."""

    prefix = "cmpl"
    whole_kind = part_kind = "text_completion"

    def whole(self, content: Content, scored: bool, texts: TokenTexts) -> Json:
        """Return text and likelihoods; a part looks the same."""
        logprobs = completion_scores(content.scores, texts) if scored else None
        return {"text": content.text, "logprobs": logprobs}

    def opening(self) -> Json | None:
        """Nothing goes before the text."""

    part = whole


class ChatFormat:
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_kind = "chat.completion"
    part_kind = "chat.completion.chunk"

    def whole(self, content: Content, scored: bool, texts: TokenTexts) -> Json:
        """Return the assistant's message and likelihoods."""
        logprobs = chat_scores(content.scores, texts) if scored else None
        message = {"role": "assistant", "content": content.text, "refusal": None}
        return {"message": message, "logprobs": logprobs}

    def opening(self) -> Json | None:
        """Say whose message it is."""
        return {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

    def part(self, content: Content, scored: bool, texts: TokenTexts) -> Json:
        """Return what is added to the message."""
        logprobs = chat_scores(content.scores, texts) if scored else None
        delta = {"content": content.text} if content.text else {}
        return {"delta": delta, "logprobs": logprobs}


class ReplyWriter:
    """Writes one reply: the same id and time in all its parts."""

    def __init__(self, format: ReplyFormat, service: Service, call: Call) -> None:
        self._format = format
        self._texts = service.texts
        self._scored = call.top is not None
        self._statistics = call.wishes.statistics
        self._traced = call.wishes.trace
        self._engine = service.engine
        self._head: Json = {
            "id": f"{format.prefix}-{uuid.uuid4().hex}",
            "created": service.now(),
            "model": service.settings.model_id,
            "system_fingerprint": service.fingerprint,
        }
        # Where a stream tells its usage at the end, all parts before it say that they do not.
        self._no_usage: Json = {"usage": None} if call.wishes.usage else {}

    def whole(self, contents: Sequence[Content], usage: Json) -> Json:
        """Return the complete reply."""
        choices = [
            self._choice(index, self._format.whole(each, self._scored, self._texts), each)
            for index, each in enumerate(contents)
        ]
        return {**self._head, "object": self._format.whole_kind, "choices": choices, "usage": usage}

    def opening(self, index: int) -> Json | None:
        """Return what begins a choice in a stream, if something does."""
        fields = self._format.opening()
        return None if fields is None else self._chunk([self._choice(index, fields, Content())])

    def part(self, index: int, content: Content, usage: Json | None = None) -> Json:
        """Return what adds to a choice in a stream; `usage` is what the reply has taken so far."""
        fields = self._format.part(content, self._scored, self._texts)
        chunk = self._chunk([self._choice(index, fields, content)])
        return chunk if usage is None else {**chunk, "usage": usage}

    def last(self, usage: Json) -> Json:
        """Return the end of a stream that tells its usage."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: Sequence[Json]) -> Json:
        kind = self._format.part_kind
        return {**self._head, "object": kind, "choices": choices, **self._no_usage}

    def _choice(self, index: int, fields: Json, content: Content) -> Json:
        choice = {"index": index, **fields, "finish_reason": content.reason}
        if self._statistics and content.statistics is not None:
            choice["statistics"] = content.statistics.as_dict()
        if self._traced and (content.tokens or content.records):
            choice["trace"] = trace_of(content.tokens, content.records, self._texts, self._engine)
        return choice


def usage_of(statistics: Iterable[Sequence[ChoiceStatistics]]) -> Json:
    """Return the tokens of a reply; each prompt counts once, however many choices it got."""
    by_prompt = list(statistics)
    prompt = sum(each[0].prompt_tokens for each in by_prompt)
    completion = sum(one.completion_tokens for each in by_prompt for one in each)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(each[0].reused_tokens for each in by_prompt)
        },
    }
