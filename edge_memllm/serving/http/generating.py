"""The endpoints that generate: read the call, ask the engine, write the reply as it comes.

Whoever asked may leave at any time: everything is cancelled then, within one token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from edge_memllm.serving.channel import Reply
from edge_memllm.serving.http.body import read_object
from edge_memllm.serving.http.call import Call
from edge_memllm.serving.http.events import DONE, WAITING, EventStream, event
from edge_memllm.serving.http.fields import Fields
from edge_memllm.serving.http.gathering import Addition, Gathering
from edge_memllm.serving.http.guard import client_of
from edge_memllm.serving.http.merging import merged
from edge_memllm.serving.http.reply_format import Json, ReplyFormat, ReplyWriter
from edge_memllm.serving.http.service import Service

ReadCall = Callable[[Fields, Service], Call]


class Generating:
    """One endpoint: `read` says what its requests mean, `format` how its replies look."""

    def __init__(self, service: Service, read: ReadCall, format: ReplyFormat) -> None:
        self._service = service
        self._read = read
        self._format = format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI). Raises `ApiError` while nothing has been sent."""
        values = await read_object(Request(scope, receive), self._service.settings.limits)
        call = await run_in_threadpool(self._read, Fields(values), self._service)
        async with AsyncExitStack() as stack:
            replies = await run_in_threadpool(self._submit, call, client_of(scope))
            for reply in replies:
                stack.callback(reply.cancel)
            left = await stack.enter_async_context(_cancelled_when_left(receive, replies))
            answer = _Answer(call, self._service, self._format, replies, left)
            if call.wishes.stream:
                await answer.stream(send)
            elif await answer.gather():
                await JSONResponse(answer.whole())(scope, receive, send)

    def _submit(self, call: Call, client: str) -> list[Reply]:
        """Ask for all prompts, or none: if the queue is full on the way, no reply is kept."""
        service = self._service
        with ExitStack() as undo:
            replies: list[Reply] = []
            for request in call.requests(client, service.settings.limits.reply_seconds):
                replies.append(service.engine.submit(request))
                undo.callback(replies[-1].cancel)
            undo.pop_all()
        return replies


class _Answer:
    """A call that is being answered."""

    def __init__(
        self,
        call: Call,
        service: Service,
        format: ReplyFormat,
        replies: Sequence[Reply],
        left: asyncio.Event,
    ) -> None:
        self._wishes = call.wishes
        self._left = left
        self._service = service
        self._replies = replies
        self._gathering = Gathering(call, service, replies)
        self._writer = ReplyWriter(format, service, call)

    async def gather(self) -> bool:
        """Wait for everything; False when nobody waits for it any more."""
        async with aclosing(self._additions()) as additions:
            async for _ in additions:
                pass
        return not self._left.is_set()

    def whole(self) -> Json:
        """Return the complete reply."""
        return self._writer.whole(self._gathering.wholes, self._gathering.usage())

    async def stream(self, send: Send) -> None:
        """Send the reply as it comes. An error that comes late becomes an event of its own."""
        stream = EventStream(send)
        try:
            await self._stream_into(stream)
        except Exception as error:
            if not stream.begun:
                raise
            await stream.put(event(self._service.explained(error).body()))
        if not self._left.is_set():
            await stream.end()

    async def _stream_into(self, stream: EventStream) -> None:
        async with aclosing(self._additions()) as additions:
            async for addition in additions:
                for data in self._events(addition):
                    await stream.put(data)
        if self._left.is_set():
            return
        if self._wishes.usage:
            await stream.put(event(self._writer.last(self._gathering.usage())))
        await stream.put(DONE)

    def _events(self, addition: Addition | None) -> Iterator[bytes]:
        if addition is None:
            yield WAITING
            return
        index, part, first = addition
        opening = self._writer.opening(index) if first else None
        if opening is not None:
            yield event(opening)
        if part.text or part.scores or part.reason or part.records:
            yield event(self._writer.part(index, part))

    async def _additions(self) -> AsyncGenerator[Addition | None, None]:
        """Yield what comes; None when nothing has come for a while."""
        pulse = self._service.settings.pulse_seconds
        async with aclosing(merged(self._replies, pulse)) as arriving:
            async for item in arriving:
                if item is None:
                    yield None
                    continue
                self._service.note_piece(item[1])
                yield self._gathering.add(*item)


@asynccontextmanager
async def _cancelled_when_left(
    receive: Receive, replies: Sequence[Reply]
) -> AsyncIterator[asyncio.Event]:
    """Cancel the replies as soon as the client has gone; the event says that it has."""
    left = asyncio.Event()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()
        for reply in replies:
            reply.cancel()

    task = asyncio.create_task(watch())
    try:
        yield left
    finally:
        task.cancel()
