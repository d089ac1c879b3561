"""Several replies read at once, in the order in which their pieces come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from edge_memllm.serving.channel import Reply
from edge_memllm.serving.pieces import ReplyPiece

# A piece with the number of its reply, what went wrong, or None at the end of a reply.
_Item = tuple[int, ReplyPiece] | Exception | None


async def merged(
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
