"""Pieces for asyncio: on demand, never holding the loop up, ended by cancelling the task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from edge_memllm import Model, RequestError
from support.engine import GatedRuntime
from support.small_model import open_small_model


@pytest.fixture
def runtime() -> GatedRuntime:
    return GatedRuntime()


@pytest.fixture
def model(folder: Path, runtime: GatedRuntime) -> Iterator[Model]:
    with open_small_model(folder, runtime) as opened:
        yield opened


def workers() -> int:
    return sum(each.name.startswith("edge-memllm-stream") for each in threading.enumerate())


async def settled() -> None:
    """Idle threads end a moment after they are told to."""
    for _ in range(500):
        if not workers():
            return
        await asyncio.sleep(0.01)


def test_it_yields_what_stream_yields(model: Model) -> None:
    async def tokens() -> list[int]:
        stream = model.astream("hello", max_new_tokens=9, ignore_eos=True, seed=4)
        found = [piece.token async for piece in stream]
        await settled()
        return found

    expected = [piece.token for piece in model.stream("hello", max_new_tokens=9, ignore_eos=True)]
    assert asyncio.run(tokens()) == expected
    assert workers() == 0


def test_requests_are_checked_at_once(model: Model) -> None:
    with pytest.raises(RequestError, match="max_new_tokens is 0"):
        model.astream("hello", max_new_tokens=0)


def test_many_streams_share_one_loop(model: Model) -> None:
    async def text(seed: int) -> list[int]:
        stream = model.astream("hello", max_new_tokens=9, ignore_eos=True, seed=seed)
        return [piece.token async for piece in stream]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(text(seed) for seed in range(8)))

    found = asyncio.run(all_of_them())
    assert found == [found[0]] * 8  # greedy


def test_the_loop_is_free_while_a_step_computes(model: Model, runtime: GatedRuntime) -> None:
    async def run() -> int:
        runtime.gate.clear()
        first = asyncio.ensure_future(anext(model.astream("hello", ignore_eos=True)))
        ticks = 0
        for _ in range(20):
            await asyncio.sleep(0.001)
            ticks += not first.done()
        runtime.gate.set()
        assert (await first).token >= 0
        return ticks

    assert asyncio.run(run()) == 20


def test_nothing_is_computed_before_it_is_asked_for(model: Model, runtime: GatedRuntime) -> None:
    async def run() -> int:
        async with aclosing(model.astream("hello", ignore_eos=True)) as stream:
            await anext(stream)
            await asyncio.sleep(0.02)
            return len(runtime.steps)

    assert asyncio.run(run()) == 1


def test_leaving_early_frees_all(model: Model, runtime: GatedRuntime) -> None:
    async def run() -> None:
        async with aclosing(model.astream("hello", ignore_eos=True)) as stream:
            async for _ in stream:
                break
        assert runtime.caches[0].closed
        await settled()

    asyncio.run(run())
    assert workers() == 0


def test_cancelling_the_task_ends_the_computing(model: Model, runtime: GatedRuntime) -> None:
    async def run() -> None:
        runtime.gate.clear()
        task = asyncio.ensure_future(anext(model.astream("hello", ignore_eos=True)))
        while not runtime.caches:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.01)
        runtime.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert runtime.caches[0].closed
        await settled()

    asyncio.run(run())
    assert len(runtime.steps) <= 1
    assert workers() == 0


def test_what_goes_wrong_is_raised(model: Model, runtime: GatedRuntime) -> None:
    async def run() -> None:
        runtime.failure = OSError("the disk is gone")
        async for _ in model.astream("hello"):
            pass

    with pytest.raises(OSError, match="the disk is gone"):
        asyncio.run(run())


def test_a_session_can_be_used_right_after(model: Model) -> None:
    async def run() -> None:
        with model.session(seed=1) as session:
            session.append("hello")
            async with aclosing(session.astream(ignore_eos=True)) as stream:
                first = await anext(stream)
            assert session.tokens[5:] == (first.token,)
            session.append(" again")
            rest = [piece async for piece in session.astream(max_new_tokens=3, ignore_eos=True)]
            assert len(rest) == 3

    asyncio.run(run())
