"""Pieces of text for asyncio: a thread computes them, one at a time, as they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor

from edge_memllm.cancellation import Cancellation
from edge_memllm.streaming import Piece


async def in_thread(
    pieces: Generator[Piece, None, None], cancellation: Cancellation
) -> AsyncGenerator[Piece, None]:
    """Yield `pieces`, which look at `cancellation`, without holding up the event loop.

    The next piece is computed when it is asked for, so a slow reader is never run over. When the
    task is cancelled, or the iterator closed, the computing ends within one token, and is waited
    for: afterwards nothing of it is in use.
    """
    loop = asyncio.get_running_loop()
    worker = ThreadPoolExecutor(1, thread_name_prefix="edge-memllm-stream")
    try:
        while (piece := await loop.run_in_executor(worker, next, pieces, None)) is not None:
            yield piece
    finally:
        cancellation.cancel()
        closed = worker.submit(pieces.close)
        worker.shutdown(wait=False)
        await asyncio.shield(asyncio.wrap_future(closed))
