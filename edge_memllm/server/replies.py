"""The endpoints that generate: read the call, ask the engine, write the reply as it comes.

Whoever asked may leave at any time: everything is cancelled then, within one token.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Sequence,
)
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager
from time import monotonic
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from edge_memllm.engine.grammar import MakeConstraint
from edge_memllm.engine.reply import Reply, ReplyPiece
from edge_memllm.errors import DeadlineError
from edge_memllm.server.calls import Call
from edge_memllm.server.fields import ApiError, Body, BodyFields, explained, parsed, received
from edge_memllm.server.guard import client_of
from edge_memllm.server.models import ServedModels
from edge_memllm.server.reply_format import (
    WAITING,
    Addition,
    EventStream,
    GatheredContent,
    Json,
    ReplyWriter,
)
from edge_memllm.server.service import Service
from edge_memllm.server.settings import Limits

# A piece with the number of its reply, what went wrong, or None at the end of a reply.
_Item = tuple[int, ReplyPiece] | Exception | None

Found = TypeVar("Found")
ReadCall = Callable[[BodyFields, Service], Call]
MakeWriter = Callable[[Service, Call], ReplyWriter]


class GenerationEndpoint:
    """One endpoint: `read` says what its requests mean, `write` how its replies look."""

    def __init__(
        self,
        models: ServedModels,
        read: ReadCall,
        write: MakeWriter,
        refuse: Callable[[ApiError], Response] = ApiError.response,
    ) -> None:
        """Take what an endpoint is; `refuse` says how an error looks before a reply begins."""
        self._models = models
        self._state = models.state
        self._read = read
        self._write = write
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        except ClientDisconnect:
            raise
        except Exception as error:
            if begun:
                raise
            await self._refuse(explained(error))(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        since = monotonic()
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._limits.reply_seconds):
                    asked = await self._asked(scope, receive, since, stack)
            except TimeoutError:
                raise self._too_late() from None
            service, call, replies, client = asked
            try:
                answer = _Answer(call, service, self._write(service, call), replies, client)
                if call.stream:
                    await answer.stream(send)
                elif await answer.gather():
                    await JSONResponse(answer.whole())(scope, receive, send)
            except ClientDisconnect:
                raise
            except Exception as error:
                raise service.explained(error) from error

    async def _asked(
        self, scope: Scope, receive: Receive, since: float, stack: AsyncExitStack
    ) -> tuple[Service, Call, list[Reply], _Client]:
        """Read a request and ask the engine of its model, which is loaded for it if need be."""
        async with received(Request(scope, receive), self._limits, self._state.long_bodies) as body:
            client = await stack.enter_async_context(_watched(receive))
            lane = self._state.lane(body)
            fields = await client.wait_for(lane.run(self._parsed, body))
            model = self._models.asked(fields)
            service = await client.wait_for(self._models.kept(model, stack))
            call = await client.wait_for(lane.run(self._read, fields, service))
            self._models.keep(model, call.keep_alive)
        constraint = await client.wait_for(
            service.constraint(call.form, call.tools, call.reasoning)
        )
        replies = await self._state.quick.run(
            self._submit, service, call, client_of(scope), since, constraint
        )
        for reply in replies:
            stack.callback(reply.cancel)
            client.on_leaving(reply.cancel)
        return service, call, replies, client

    @property
    def _limits(self) -> Limits:
        return self._state.settings.limits

    def _parsed(self, body: Body) -> BodyFields:
        return BodyFields(parsed(body, self._limits))

    def _submit(
        self,
        service: Service,
        call: Call,
        client: str,
        since: float,
        constraint: MakeConstraint | None,
    ) -> list[Reply]:
        """Ask for all prompts, or none: if the queue is full on the way, no reply is kept."""
        timeout = self._limits.reply_seconds
        with ExitStack() as undo:
            replies: list[Reply] = []
            for request in call.requests(client, timeout, since, constraint):
                replies.append(service.engine.submit(request))
                undo.callback(replies[-1].cancel)
            undo.pop_all()
        return replies

    def _too_late(self) -> DeadlineError:
        return DeadlineError(
            f"The request was given {self._limits.reply_seconds:g} seconds, and it was not read by "
            "then: others were before it, or it is long. Try again when less is asked."
        )


class _Answer:
    """A call that is being answered."""

    def __init__(
        self,
        call: Call,
        service: Service,
        writer: ReplyWriter,
        replies: Sequence[Reply],
        client: _Client,
    ) -> None:
        self._call = call
        self._client = client
        self._service = service
        self._replies = replies
        self._content = GatheredContent(call, service, replies)
        self._writer = writer

    async def gather(self) -> bool:
        """Wait for everything; False when nobody waits for it any more."""
        async with aclosing(self._additions()) as additions:
            async for _ in additions:
                pass
        return not self._client.left

    def whole(self) -> Json:
        """Return the complete reply."""
        return self._writer.whole(self._content.wholes, self._content.usage())

    async def stream(self, send: Send) -> None:
        """Send the reply as it comes. An error that comes late becomes an event of its own."""
        stream = EventStream(send)
        try:
            await self._stream_into(stream)
        except Exception as error:
            if not stream.begun:
                raise
            await stream.put(self._writer.failure(self._service.explained(error)))
        if not self._client.left:
            await stream.end()

    async def _stream_into(self, stream: EventStream) -> None:
        async with aclosing(self._additions()) as additions:
            async for addition in additions:
                for data in self._events(addition):
                    await stream.put(data)
        if self._client.left:
            return
        for data in self._writer.ending(self._content.usage()):
            await stream.put(data)

    def _events(self, addition: Addition | None) -> Iterator[bytes]:
        if addition is None:
            yield WAITING
            return
        usage = self._content.usage_so_far() if self._call.running_usage else None
        yield from self._writer.events(addition, usage)

    async def _additions(self) -> AsyncGenerator[Addition | None, None]:
        """Yield what comes; None when nothing has come for a while."""
        pulse = self._service.settings.pulse_seconds
        async with aclosing(interleaved(self._replies, pulse)) as arriving:
            async for item in arriving:
                if item is None:
                    yield None
                    continue
                self._service.note_piece(item[1])
                if self._content.takes_long(*item):
                    yield await self._service.quick.run(self._content.add, *item)
                else:
                    yield self._content.add(*item)


async def interleaved(
    replies: Sequence[Reply], pulse: float
) -> AsyncGenerator[tuple[int, ReplyPiece] | None, None]:
    """Yield (number of the reply, piece), and None whenever nothing came for `pulse` seconds.

    Ends with the last reply, or raises what went wrong with the first one that failed.
    """
    queue: asyncio.Queue[_Item] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(*each, queue)) for each in enumerate(replies)]
    try:
        left = len(replies)
        while left:
            try:
                async with asyncio.timeout(pulse):
                    item = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def _pump(number: int, reply: Reply, queue: asyncio.Queue[_Item]) -> None:
    try:
        async for piece in reply:
            queue.put_nowait((number, piece))
    except Exception as error:  # handed over to whoever reads, who knows what to do
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)


@asynccontextmanager
async def _watched(receive: Receive) -> AsyncIterator[_Client]:
    """Watch a client; its whole request must have been received."""
    client = _Client(receive)
    try:
        yield client
    finally:
        client.forget()


class _Client:
    """Who asked, as far as it is still there."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._leaving: list[Callable[[], object]] = []
        self._task = asyncio.create_task(self._watch())

    @property
    def left(self) -> bool:
        """Whether it has gone."""
        return self._task.done()

    def on_leaving(self, act: Callable[[], object]) -> None:
        """Call something as soon as it has gone."""
        if self.left:
            act()
        self._leaving.append(act)

    async def wait_for(self, work: Coroutine[None, None, Found]) -> Found:
        """Return what `work` comes to. Raises `ClientDisconnect` if the client goes before."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self._task), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()

    def forget(self) -> None:
        """Look no longer."""
        self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        for act in self._leaving:
            act()
