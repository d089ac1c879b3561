"""Replies read in asyncio."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from edge_memllm import Model
from edge_memllm.engine import Engine, Request
from edge_memllm.errors import DeadlineError
from support.engine import GatedRuntime, held, serial, tokens_of, wait_until


def test_replies_can_be_read_in_asyncio(model: Model) -> None:
    request = Request(prompt=[1, 2, 3], max_new_tokens=20)

    async def read(engine: Engine) -> list[int | None]:
        return [piece.token async for piece in engine.submit(request)]

    async def several(engine: Engine) -> list[list[int | None]]:
        return await asyncio.gather(*(read(engine) for _ in range(4)))

    with Engine(model) as engine:
        assert asyncio.run(several(engine)) == [serial(model, request)] * 4


def test_a_cancelled_task_frees_its_place(model: Model, runtime: GatedRuntime) -> None:
    async def leave(engine: Engine) -> None:
        begun = asyncio.Event()

        async def read() -> None:
            with engine.submit(Request(prompt=[1], ignore_eos=True)) as reply:
                async for _ in reply:
                    begun.set()

        runtime.pause_at = len(runtime.steps) + 3
        task = asyncio.create_task(read())
        await begun.wait()
        await asyncio.to_thread(wait_until, lambda: not runtime.gate.is_set())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        runtime.gate.set()

    with Engine(model) as engine:
        for _ in range(20):
            asyncio.run(leave(engine))
        wait_until(lambda: engine.statistics.under_way == 0)


def test_a_reader_whose_loop_is_gone_does_not_stop_the_engine(model: Model, runtime: Any) -> None:
    with Engine(model) as engine:
        reply = held(engine, runtime, Request(prompt=[1], max_new_tokens=3, ignore_eos=True))

        async def leave() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(reply.__aiter__()), 0.01)

        asyncio.run(leave())
        runtime.gate.set()
        assert len(tokens_of(reply)) == 3


def test_a_deadline_holds_in_asyncio_while_a_step_does_not_come_back(
    model: Model, runtime: GatedRuntime
) -> None:
    async def read(engine: Engine) -> None:
        wish = Request(prompt=[1], timeout=0.05)
        with pytest.raises(DeadlineError, match=r"given 0\.05 seconds"):
            [piece async for piece in held(engine, runtime, wish)]

    with Engine(model) as engine:
        start = time.monotonic()
        asyncio.run(read(engine))
        assert time.monotonic() - start < 5  # the gate waits for 10
        runtime.gate.set()
        assert list(engine.submit(Request(prompt=[1])))
