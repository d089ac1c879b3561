"""More than the server can do: it says so, serves the others, and recovers. And how it ends."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from edge_memllm import Sampling
from support.engine import GatedRuntime, wait_until
from support.server import Served, busy, serving_small
from support.small_model import open_small_model

SLOTS, QUEUE = 2, 4


@pytest.fixture
def runtime() -> GatedRuntime:
    return GatedRuntime()


@pytest.fixture
def served(folder: Path, runtime: GatedRuntime) -> Iterator[Served]:
    engine = {"slots": SLOTS, "queue": QUEUE}
    with serving_small(folder, runtime, engine=engine, drain_seconds=5) as found:
        yield found
        runtime.gate.set()


def test_ten_times_too_much_is_refused_and_the_rest_is_right(
    served: Served, runtime: GatedRuntime, folder: Path
) -> None:
    wanted = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    runtime.gate.clear()
    with ThreadPoolExecutor(60) as pool:
        asked = [
            (text, pool.submit(served.post, "/v1/completions", {"prompt": text, **wanted}))
            for text in (f"text {number}" for number in range(10 * (SLOTS + QUEUE)))
        ]
        wait_until(lambda: served.service.metrics.under_way == SLOTS + QUEUE)
        wait_until(lambda: busy(served.engine) == SLOTS + QUEUE)
        runtime.gate.set()
        replies = [(text, future.result()) for text, future in asked]
    statuses = Counter(reply.status_code for _, reply in replies)
    assert statuses[200] >= SLOTS + QUEUE
    assert statuses[429] >= 10
    assert set(statuses) == {200, 429}
    with open_small_model(folder) as model:
        for text, reply in replies:
            if reply.status_code == 200:
                alone = model.generate(
                    text, max_new_tokens=12, sampling=Sampling(), ignore_eos=True
                )
                assert reply.json()["choices"][0]["text"] == alone
            else:
                assert 1 <= int(reply.headers["retry-after"]) < 600
    served.settled()
    assert served.complete(**wanted)["usage"]["completion_tokens"] == 12


def test_the_client_tries_again_by_itself(served: Served, runtime: GatedRuntime) -> None:
    runtime.gate.clear()
    held = [served.ask_raw({"prompt": "x", "max_tokens": 2}) for _ in range(SLOTS + QUEUE)]
    wait_until(lambda: busy(served.engine) == SLOTS + QUEUE)
    with served.openai() as client, pytest.raises(openai.RateLimitError, match="texts wait"):
        client.completions.create(model="small", prompt="x")
    threading.Timer(0.3, runtime.gate.set).start()
    with served.openai(max_retries=2) as client:
        assert client.completions.create(model="small", prompt="x", max_tokens=1).choices
    for each in held:
        each.close()


def test_a_client_that_waits_no_longer_frees_its_slot(
    served: Served, runtime: GatedRuntime
) -> None:
    runtime.gate.clear()
    with ThreadPoolExecutor(1) as pool, served.openai(timeout=1.5) as client:
        asked = pool.submit(client.completions.create, model="small", prompt="x", n=2)
        wait_until(lambda: busy(served.engine) == 2)
        with pytest.raises(openai.APITimeoutError):
            asked.result()
    wait_until(lambda: served.service.metrics.under_way == 0)
    runtime.gate.set()
    served.settled()
    assert served.engine.statistics.given_up == 2


def replies_when_ending(served: Served, count: int) -> list[Any]:
    """Ask for so many long streams; return the futures of what becomes of them."""
    wanted = {"prompt": "x", "max_tokens": 50, "ignore_eos": True, "stream": True}
    pool = ThreadPoolExecutor(count)
    futures = [pool.submit(served.post, "/v1/completions", wanted) for _ in range(count)]
    wait_until(lambda: busy(served.engine) == count)
    pool.shutdown(wait=False)
    return futures


def test_ending_finishes_what_is_under_way(served: Served, runtime: GatedRuntime) -> None:
    runtime.gate.clear()
    futures = replies_when_ending(served, SLOTS + 1)  # one of them waits
    served.server.handle_exit(15, None)
    wait_until(lambda: not accepts(served))
    runtime.gate.set()
    for future in futures:
        assert future.result().text.endswith("data: [DONE]\n\n")
    served.thread.join(5)
    assert not served.thread.is_alive()
    assert not served.server.forced


def accepts(served: Served) -> bool:
    try:
        served.connect().close()
    except OSError:
        return False
    return True


def test_ending_has_a_deadline(folder: Path) -> None:
    runtime = SlowRuntime()
    with serving_small(folder, runtime, drain_seconds=0.3) as served:
        futures = replies_when_ending(served, 2)
        start = time.monotonic()
        served.server.handle_exit(15, None)
        for future in futures:
            text = future.result().text
            assert "[DONE]" not in text
            assert '"code":"draining"' in text
        served.thread.join(5)
    assert time.monotonic() - start < 4


class SlowRuntime(GatedRuntime):
    """Takes its time for each step."""

    def step(self, *arguments: Any, **more: Any) -> Any:
        time.sleep(0.05)
        return super().step(*arguments, **more)


def test_asked_twice_it_ends_at_once(folder: Path) -> None:
    runtime = SlowRuntime()
    with serving_small(folder, runtime, drain_seconds=60) as served:
        futures = replies_when_ending(served, 2)
        start = time.monotonic()
        served.server.handle_exit(15, None)
        time.sleep(0.2)
        assert served.thread.is_alive()
        served.server.handle_exit(15, None)
        served.thread.join(5)
        assert not served.thread.is_alive()
        assert served.server.forced
        for future in futures:
            assert future.exception() is not None or "[DONE]" not in future.result().text
    assert time.monotonic() - start < 4
