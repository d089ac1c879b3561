"""The shape of replies: what completions and chat have in common, and where they differ.

A reply is made of choices. The same classes write them whole, or in parts as they come, which are
events of a stream.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

from starlette.types import Send

from edge_memllm.engine.engine import Engine
from edge_memllm.engine.reply import (
    ChoiceStatistics,
    PromptProgress,
    RecordUse,
    Reply,
    ReplyPiece,
)
from edge_memllm.engine.scores import TokenScore
from edge_memllm.server.calls import Call
from edge_memllm.server.fields import ApiError
from edge_memllm.server.protocols.timings import RunningTimings, progress_of, timings_of
from edge_memllm.server.service import Service
from edge_memllm.statistics import process_memory
from edge_memllm.text.reasoning import ReasoningParser
from edge_memllm.text.token_texts import TokenTexts
from edge_memllm.text.tokenization import Detokenizer
from edge_memllm.text.tools.parsing import CallArguments, CallBegins, ReplyText

Json = dict[str, Any]

_MANY = 512  # tokens that are quickly written out

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy in between must not collect them
]
DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"


# All that is told of a choice, its prompt among it.
TellAll: TypeAlias = Callable[["Content", Sequence[int], Call, Service], Json]


class ReplyWriter(Protocol):
    """Writes one reply, whole or as the events of a stream."""

    def whole(self, contents: Sequence[Content], usage: Json) -> Json:
        """Return the complete reply."""

    def events(self, addition: Addition, usage: Json | None) -> Iterator[bytes]:
        """Yield what tells of an addition; `usage` is what the reply has taken, where asked for."""

    def ending(self, usage: Json) -> Iterator[bytes]:
        """Yield what ends a stream that is complete."""

    def failure(self, error: ApiError) -> bytes:
        """Return the event that ends a stream in which something went wrong."""


class ChunkWriter:
    """Completions and chat, whose streams are chunks: the same id and time in all of them."""

    def __init__(
        self, format: ReplyFormat, tell_all: TellAll, service: Service, call: Call
    ) -> None:
        """Take how choices look; `tell_all` is for who asks for all there is to tell."""
        self._format = format
        self._tell_all = tell_all
        self._texts = service.texts
        self._scored = call.request.top is not None
        self._statistics = call.statistics
        self._traced = call.request.trace
        self._service, self._call = service, call
        self._engine = service.engine
        self._last: Json = {}  # timings of the last choice that ended
        self._head: Json = {
            "id": f"{format.prefix}-{uuid.uuid4().hex}",
            "created": service.now(),
            "model": service.settings.model_id,
            "system_fingerprint": service.fingerprint,
        }
        # Where a stream tells its usage at the end, all parts before it say that they do not.
        self._no_usage: Json = {"usage": None} if call.usage else {}

    def whole(self, contents: Sequence[Content], usage: Json) -> Json:
        """Return the complete reply."""
        choices = [
            self._choice(index, self._format.whole(each, self._scored, self._texts), each)
            for index, each in enumerate(contents)
        ]
        told: Json = {}
        if len(contents) == 1:  # of several, none is the whole's
            (content,) = contents
            told["timings"] = content.timings
            if self._call.verbose:
                (prompt,) = self._call.prompts
                told["__verbose"] = self._tell_all(content, prompt, self._call, self._service)
        kind = self._format.whole_kind
        return {**self._head, "object": kind, "choices": choices, "usage": usage, **told}

    def events(self, addition: Addition, usage: Json | None) -> Iterator[bytes]:
        """Yield what begins a choice, if something does, and what adds to it."""
        index, part, first = addition
        opening = self._format.opening() if first else None
        if opening is not None:
            yield event(self._chunk([self._choice(index, opening, Content())]))
        for each in self._format.steps(part):
            fields = self._format.part(each, self._scored, self._texts)
            chunk = self._chunk([self._choice(index, fields, each)])
            if each.progress is not None:
                chunk["prompt_progress"] = progress_of(each.progress)
            if self._call.timings or each.reason is not None:
                chunk["timings"] = each.timings
            if each.reason is not None:
                self._last = {"timings": each.timings}
            yield event(chunk if usage is None else {**chunk, "usage": usage})

    def ending(self, usage: Json) -> Iterator[bytes]:
        """Yield what a stream has taken, if that is asked for, and the word that ends it."""
        if self._no_usage:
            yield event({**self._chunk([]), "usage": usage, **self._last})
        yield DONE

    def failure(self, error: ApiError) -> bytes:
        """Return the error as an event."""
        return event(error.body())

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


class ReplyFormat(Protocol):
    """How one kind of reply is written; `scored` says whether likelihoods were asked for."""

    prefix: str  # of its id
    whole_kind: str
    part_kind: str

    def whole(self, content: Content, scored: bool, texts: TokenTexts) -> Json:
        """Return the fields of a complete choice."""

    def opening(self) -> Json | None:
        """Return the fields that begin a choice in a stream, if something does."""

    def part(self, content: Content, scored: bool, texts: TokenTexts) -> Json:
        """Return the fields that add to a choice in a stream."""

    def steps(self, content: Content) -> Iterator[Content]:
        """Yield what comes one after the other of a part; nothing of one that tells nothing."""


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

    def steps(self, content: Content) -> Iterator[Content]:
        """Yield it as it is."""
        if content.tells:
            yield content


class ChatFormat:
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_kind = "chat.completion"
    part_kind = "chat.completion.chunk"

    def whole(self, content: Content, scored: bool, texts: TokenTexts) -> Json:
        """Return the assistant's message and likelihoods."""
        logprobs = chat_scores(content.scores, texts) if scored else None
        message: Json = {"role": "assistant", "content": content.text, "refusal": None}
        if content.reasoning:
            message["reasoning_content"] = content.reasoning
        if content.calls:
            message |= {
                "content": content.text or None,
                "tool_calls": [_whole_call(each) for each in content.calls],
            }
        return {"message": message, "logprobs": logprobs}

    def opening(self) -> Json | None:
        """Say whose message it is."""
        return {"delta": {"role": "assistant", "content": None, "refusal": None}, "logprobs": None}

    def part(self, content: Content, scored: bool, texts: TokenTexts) -> Json:
        """Return what is added to the message."""
        logprobs = chat_scores(content.scores, texts) if scored else None
        delta: Json = {"reasoning_content": content.reasoning} if content.reasoning else {}
        if content.text:
            delta["content"] = content.text
        if content.calls:
            delta["tool_calls"] = [_call_part(each) for each in content.calls]
        return {"delta": delta, "logprobs": logprobs}

    def steps(self, content: Content) -> Iterator[Content]:
        """Yield what is said, and then why it ends, with what it took."""
        said = content.text or content.reasoning or content.calls or content.scores
        if content.reason is not None and said:
            yield replace(content, reason=None, statistics=None)
            yield Content(
                reason=content.reason, statistics=content.statistics, timings=content.timings
            )
        elif content.tells:
            yield content


def _whole_call(call: CallPiece) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _call_part(call: CallPiece) -> Json:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **_whole_call(call)}


@dataclass(slots=True)
class CallPiece:
    """What a choice holds of one call, whole or in part; only the first part has a name."""

    index: int  # of the choice's calls
    id: str
    name: str | None
    arguments: str = ""
    complete: bool = False  # with this


@dataclass(slots=True)
class Content:
    """What a choice holds, whole or in part; it is finished once there is a reason."""

    text: str = ""
    reasoning: str = ""  # before the text
    reasoning_tokens: int = 0
    calls: list[CallPiece] = field(default_factory=list)
    scores: list[PlacedScore] = field(default_factory=list)
    reason: str | None = None
    statistics: ChoiceStatistics | None = None
    tokens: list[int] = field(default_factory=list)
    records: list[RecordUse] = field(default_factory=list)
    stopped_by: str | None = None  # a stop string
    progress: PromptProgress | None = None  # of the prompt; such a part has no more
    timings: Json | None = None

    @property
    def tells(self) -> bool:
        """Whether there is anything in it for who asked."""
        said = self.text or self.reasoning or self.calls or self.scores or self.records
        return bool(said or self.reason or self.progress)


class Addition(NamedTuple):
    """What a piece adds to a choice."""

    choice: int  # its number, among those of all prompts
    part: Content
    first: bool


class GatheredContent:
    """All choices of one call, in the order of its prompts. Not thread-safe."""

    def __init__(self, call: Call, service: Service, replies: Sequence[Reply]) -> None:
        self.wholes = [Content() for _ in range(len(call.prompts) * call.request.choices)]
        self._opened: set[int] = set()  # of which something has come
        self._begun: set[int] = set()  # whose first token has
        self._clocks = [RunningTimings() for _ in self.wholes]
        reasoning = call.reasoning
        self._reasoning = [
            None if reasoning is None else ReasoningParser(reasoning) for _ in self.wholes
        ]
        self._parsers = [None if call.tools is None else call.tools.parser() for _ in self.wholes]
        self._call = call
        self._service = service
        self._replies = replies

    def usage_so_far(self) -> Json:
        """Return the tokens of what has come."""
        prompt = sum(len(each.prompt) for each in self._replies)
        completion = sum(len(each.tokens) for each in self.wholes)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def takes_long(self, prompt: int, piece: ReplyPiece) -> bool:
        """Whether adding a piece will: where each token of a prompt begins has to be found out."""
        scores = self._replies[prompt].prompt_scores or ()
        return self._call.echo is not None and len(scores) > _MANY and not self._has(prompt, piece)

    def add(self, prompt: int, piece: ReplyPiece) -> Addition:
        """Take a piece of a prompt's reply."""
        index = self._index(prompt, piece)
        opened, first = index not in self._opened, not self._has(prompt, piece)
        self._opened.add(index)
        self._clocks[index].note(piece.progress, piece.token)
        if piece.progress is not None:
            progress = piece.progress if self._call.progress else None
            return Addition(index, Content(progress=progress, timings=self._timings(index)), opened)
        self._begun.add(index)
        whole, part = self.wholes[index], self._echo(prompt) if first else Content()
        if piece.score is not None:
            part.scores.append(PlacedScore(piece.score, len(whole.text) + len(part.text)))
        self._add_text(index, part, piece)
        part.statistics = piece.statistics
        part.tokens = [] if piece.token is None else [piece.token]
        part.records = list(piece.records)
        whole.tokens += part.tokens
        whole.records += part.records
        whole.text += part.text
        whole.reasoning += part.reasoning
        whole.scores += part.scores
        part.stopped_by = piece.stopped_by
        part.timings = self._timings(index, part.statistics)
        whole.reason, whole.statistics = part.reason, part.statistics
        whole.stopped_by, whole.timings = part.stopped_by, part.timings
        return Addition(index, part, opened)

    def _timings(self, index: int, statistics: ChoiceStatistics | None = None) -> Json | None:
        """Return what a choice took, at its end or where that is told all along."""
        if statistics is not None:
            return timings_of(statistics)
        return self._clocks[index].told() if self._call.timings else None

    def _add_text(self, index: int, part: Content, piece: ReplyPiece) -> None:
        """Add the text of a piece to a part, or the calls in it; and why it ends, if it does."""
        parser, whole = self._parsers[index], self.wholes[index]
        part.reason = piece.finish_reason
        text, ended = self._answer(index, part, piece), piece.finish_reason is not None
        if parser is None:
            part.text += text
            return
        for each in (*parser.push(text), *(parser.flush() if ended else ())):
            match each:
                case ReplyText(text):
                    part.text += text
                case CallBegins(number, name):
                    id = self._call_id()
                    whole.calls.append(CallPiece(number, id, name))
                    part.calls.append(CallPiece(number, id, name))
                case CallArguments(number, text, last):
                    call = whole.calls[number]
                    if not part.calls or part.calls[-1].index != number:
                        part.calls.append(CallPiece(number, call.id, None))
                    for piece_of in (call, part.calls[-1]):
                        piece_of.arguments += text
                        piece_of.complete = last
        if whole.calls and part.reason == "stop":
            part.reason = "tool_calls"

    def _answer(self, index: int, part: Content, piece: ReplyPiece) -> str:
        """Add the reasoning in a piece to a part, and return what is none."""
        parser = self._reasoning[index]
        if parser is None:
            return piece.text
        inside = parser.inside
        said = parser.push(piece.text)
        if piece.finish_reason is not None:
            said += parser.flush()
        part.reasoning = "".join(each.text for each in said if each.reasoned)
        if (inside or parser.inside) and piece.token is not None:
            self.wholes[index].reasoning_tokens += 1
        return "".join(each.text for each in said if not each.reasoned)

    def _call_id(self) -> str:
        """Return the id of a new call, in the form that the model's template takes."""
        assert self._call.tools is not None
        short = self._call.tools.format.short_ids
        return uuid.uuid4().hex[:9] if short else f"call_{uuid.uuid4().hex[:24]}"

    def usage(self) -> Json:
        """Return the tokens of the whole, once it is complete."""
        count = self._call.request.choices
        known = [each.statistics for each in self.wholes if each.statistics is not None]
        usage = usage_of(known[at : at + count] for at in range(0, len(known), count))
        if self._call.reasoning is not None:
            reasoned = sum(each.reasoning_tokens for each in self.wholes)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoned}
        return usage

    def _index(self, prompt: int, piece: ReplyPiece) -> int:
        return prompt * self._call.request.choices + piece.choice

    def _has(self, prompt: int, piece: ReplyPiece) -> bool:
        return self._index(prompt, piece) in self._begun

    def _echo(self, prompt: int) -> Content:
        """Return what a choice begins with: its prompt, where that was asked for."""
        if self._call.echo is None:
            return Content()
        part = Content(self._call.echo[prompt])
        detokenizer, shown = Detokenizer(self._service.model.tokenizer), 0
        for score in self._replies[prompt].prompt_scores or ():
            part.scores.append(PlacedScore(score, shown))
            shown += len(detokenizer.push(score.token))
        return part


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


@dataclass(frozen=True, slots=True)
class PlacedScore:
    """A token's score, and where in the reply's text (in characters) the token begins."""

    score: TokenScore
    offset: int


def completion_scores(scores: Sequence[PlacedScore], texts: TokenTexts) -> dict[str, Any]:
    """Return the form of `/v1/completions`: four lists of one entry for each token.

    Tokens that are no text of their own are named by their bytes, so that no two share a name.
    """
    return {
        "tokens": [texts.text(each.score.token) for each in scores],
        "token_logprobs": [each.score.logprob for each in scores],
        "top_logprobs": [_by_text(each.score, texts) for each in scores],
        "text_offset": [each.offset for each in scores],
    }


def chat_scores(scores: Sequence[PlacedScore], texts: TokenTexts) -> dict[str, Any]:
    """Return the form of `/v1/chat/completions`: one entry for each token, with its bytes."""
    content = []
    for each in scores:
        token, logprob = each.score.token, each.score.logprob
        top = [
            _entry(other, logprob if other == token else value, texts)
            for other, value in each.score.top
        ]
        content.append({**_entry(token, logprob, texts), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _by_text(score: TokenScore, texts: TokenTexts) -> dict[str, float] | None:
    """Return the likeliest tokens, and the token itself; None where nothing predicts it."""
    if score.logprob is None:
        return None
    likeliest = {texts.text(token): value for token, value in score.top}
    return {**likeliest, texts.text(score.token): score.logprob}


def _entry(token: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.utf8(token))}


def trace_of(
    tokens: Sequence[int], records: Sequence[RecordUse], texts: TokenTexts, engine: Engine
) -> dict[str, Any]:
    """Return new tokens, the records of those fed to make them, and the memory of the server now.

    In a stream, tokens and records of the parts, put together, are those of the whole.
    """
    memory = process_memory()
    return {
        "tokens": list(tokens),
        "records": [{**asdict(each), "text": texts.text(each.token)} for each in records],
        "memory": {
            "anon_bytes": memory.anon_bytes,
            "file_bytes": memory.file_bytes,
            "peak_bytes": memory.peak_bytes,
            "kv_bytes": engine.statistics.kv_bytes,
        },
    }


def event(value: Any) -> bytes:
    """Return an event that carries JSON, which never holds a line break."""
    return b"data: " + json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream:
    """A response under way; it begins with the first event."""

    def __init__(self, send: Send) -> None:
        self.begun = False
        self._send = send

    async def put(self, data: bytes) -> None:
        """Send an event."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
