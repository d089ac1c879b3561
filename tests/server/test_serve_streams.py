"""Streams as they go over the wire, and what becomes of a reply whose reader leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_memllm import StorageError
from edge_memllm.server.settings import Limits
from support.engine import GatedRuntime, wait_until
from support.server import HELLO, TEMPLATE, Served, busy, serving_small

LONG = {"prompt": "Hello", "max_tokens": 100, "ignore_eos": True}


@pytest.fixture
def runtime() -> GatedRuntime:
    return GatedRuntime()


@pytest.fixture
def served(folder: Path, runtime: GatedRuntime) -> Iterator[Served]:
    options = {"template": TEMPLATE, "pulse_seconds": 0.05}
    with serving_small(folder, runtime, engine={"slots": 2}, **options) as found:
        yield found
        runtime.gate.set()


def test_parts_add_up_to_the_whole(served: Served) -> None:
    wanted = {"prompt": ["A", "B"], "n": 2, "max_tokens": 9, "temperature": 0.9, "seed": 4}
    whole = served.complete(**wanted, logprobs=1, echo=True)
    *parts, end = served.events(**wanted, logprobs=1, echo=True)
    assert end == "[DONE]"
    for choice in whole["choices"]:
        mine = [
            each["choices"][0] for each in parts if each["choices"][0]["index"] == choice["index"]
        ]
        assert "".join(part["text"] for part in mine) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            joined = [value for part in mine for value in part["logprobs"][name]]
            assert joined == choice["logprobs"][name]
        reasons = [part["finish_reason"] for part in mine]
        assert [reason for reason in reasons if reason] == reasons[-1:] == [choice["finish_reason"]]
    assert all("usage" not in part for part in parts)


def test_usage_comes_last_and_is_null_before(served: Served) -> None:
    asked = {"messages": HELLO, "max_tokens": 5, "stream_options": {"include_usage": True}}
    *parts, last, end = served.events("/v1/chat/completions", **asked)
    assert end == "[DONE]"
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert last["usage"]["prompt_tokens"] == len("[user]Hi[assistant]")


def test_a_prompt_that_was_there_counts_as_cached(served: Served) -> None:
    first = served.complete(prompt="A text that begins alike", max_tokens=1)
    again = served.complete(prompt="A text that begins alike", max_tokens=1)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 23


def test_statistics_come_with_the_end_of_a_choice(served: Served) -> None:
    whole = served.complete(max_tokens=3, statistics=True, seed=5)
    assert whole["choices"][0]["statistics"]["seed"] == 5
    assert whole["choices"][0]["statistics"]["completion_tokens"] == 3
    *parts, _ = served.events(prompt="Hello", max_tokens=3, statistics=True)
    found = [part["choices"][0].get("statistics") for part in parts]
    assert found[-1]["prompt_tokens"] == 5
    assert not any(found[:-1])


def lines_of(
    served: Served, at_first: Callable[[], None], path: str = "/v1/completions", **body: Any
) -> list[str]:
    """The lines of a stream; something is done when the first one has come."""
    lines: list[str] = []
    asked = {"stream": True, **body}
    with httpx.stream("POST", f"{served.url}{path}", json=asked, timeout=20) as response:
        for line in response.iter_lines():
            if not lines:
                at_first()
            if line:
                lines.append(line)
    return lines


def test_a_waiting_stream_says_so(served: Served, runtime: GatedRuntime) -> None:
    runtime.gate.clear()
    first, *_, end = lines_of(served, runtime.gate.set, prompt="x", max_tokens=2)
    assert first == ": waiting"
    assert end == "data: [DONE]"


def test_an_error_before_the_first_event_is_a_status(served: Served, runtime: GatedRuntime) -> None:
    runtime.failure = StorageError("table.safetensors: gone")
    response = served.post("/v1/completions", {"prompt": "x", "stream": True})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "StorageError"
    assert "table" not in response.text  # where files lie is nobody's business
    assert served.get("/health").json()["reason"] == "StorageError"
    served.complete(max_tokens=1)
    assert served.get("/health").json()["status"] == "ok"


def test_an_error_in_a_stream_is_an_event(served: Served, runtime: GatedRuntime) -> None:
    def fail() -> None:
        runtime.failure = StorageError("table.safetensors: gone")
        runtime.gate.set()

    runtime.gate.clear()
    *_, last = lines_of(served, fail, prompt="x", max_tokens=50)
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/v1/responses", {"input": "x", "max_output_tokens": 50}, {"type": "error"}),
        (
            "/v1/messages",
            {"messages": HELLO, "max_tokens": 50},
            {"type": "error", "error": {"type": "api_error"}},
        ),
    ],
)
def test_an_error_in_a_stream_of_typed_events_has_its_type(
    served: Served, runtime: GatedRuntime, path: str, body: dict[str, Any], error: dict[str, Any]
) -> None:
    def fail() -> None:
        runtime.failure = StorageError("table.safetensors: gone")
        runtime.gate.set()

    runtime.gate.clear()
    *_, kind, last = lines_of(served, fail, path, **body)
    found = json.loads(last.removeprefix("data: "))
    assert kind == "event: error"
    assert found["type"] == error["type"]
    assert found.get("error", {}).get("type") == error.get("error", {}).get("type")
    assert "table" not in json.dumps(found)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_stops_the_reply_within_a_token(
    served: Served, runtime: GatedRuntime, stream: bool
) -> None:
    runtime.pause_at = 4
    with served.ask_raw({**LONG, "stream": stream}):
        wait_until(lambda: len(runtime.steps) == 4 and not runtime.gate.is_set())
    # The server has to see it before the next token is let through.
    wait_until(lambda: served.service.metrics.under_way == 0)
    runtime.gate.set()
    served.settled()
    assert len(runtime.steps) <= 5
    assert served.engine.statistics.given_up == 1


def test_who_leaves_the_queue_takes_no_turn(served: Served, runtime: GatedRuntime) -> None:
    runtime.gate.clear()
    with served.ask_raw({**LONG, "n": 2}):
        wait_until(lambda: busy(served.engine) == 2)
        with served.ask_raw({**LONG, "prompt": "never"}):
            wait_until(lambda: busy(served.engine) == 3)
        wait_until(lambda: served.service.metrics.under_way == 1)
    runtime.gate.set()
    served.settled()
    assert served.engine.statistics.prompt_tokens <= 2 * len("Hello")


def test_all_prompts_are_taken_or_none(folder: Path, runtime: GatedRuntime) -> None:
    with serving_small(folder, runtime, engine={"slots": 1, "queue": 2}) as served:
        runtime.gate.clear()
        response = served.post("/v1/completions", {"prompt": ["a", "b", "c", "d"]})
        assert response.status_code == 429
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        runtime.gate.set()
        served.settled()
        assert served.engine.statistics.finished == 0


def test_a_request_that_takes_too_long_is_given_up(folder: Path, runtime: GatedRuntime) -> None:
    limits = Limits(reply_seconds=0.2)
    runtime.gate.clear()
    with serving_small(folder, runtime, limits=limits) as served, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.post, "/v1/completions", LONG)
        wait_until(lambda: busy(served.engine))
        time.sleep(0.25)
        runtime.gate.set()
        response = asked.result()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "deadline_exceeded"
