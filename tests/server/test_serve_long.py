"""Work that takes long: prompts, schemas, bodies. What cannot fit is refused at once, and nobody
else waits for the rest."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_memllm.engine import grammar
from edge_memllm.server import calls as prompts
from edge_memllm.server.fields import ApiError
from edge_memllm.server.lanes import Lane
from edge_memllm.server.settings import Limits
from edge_memllm.text.tokenization import Tokenizer
from support.engine import GatedRuntime, wait_until
from support.server import TEMPLATE, Served, serving_small

LIMITS = Limits(
    body_bytes=1 << 20,
    brief_bytes=5000,
    long_bodies=4,
    schemas_waiting=1,
    text_characters=9000,
    text_tokens=50,
    header_seconds=0.3,
    body_seconds=1.0,
)
ZIPPED = gzip.compress(b'{"prompt": "x"}', mtime=0)
LONG = 6000  # characters of a prompt that takes a while, here


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving_small(folder, limits=LIMITS, template=TEMPLATE) as found:
        yield found


class Slow:
    """Encoding a long text waits at a gate; how many do so, and did at once."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.now = self.most = self.calls = 0
        encode, lock = Tokenizer.encode, threading.Lock()

        def slowly(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
            if len(text) >= LONG:
                with lock:
                    self.calls += 1
                    self.now += 1
                    self.most = max(self.most, self.now)
                self.gate.wait(20)
                with lock:
                    self.now -= 1
            return encode(tokenizer, text, special=special)

        patched.setattr(Tokenizer, "encode", slowly)
        patched.setattr(prompts, "_SHORT", 1 << 30)  # nothing is refused by its length


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    found = Slow(monkeypatch)
    yield found
    found.gate.set()


@pytest.mark.parametrize(
    ("path", "body", "what"),
    [
        ("completions", {"prompt": "x" * 500_000}, "prompt"),
        ("completions", {"prompt": ["x", "x" * 500_000]}, "prompt"),
        ("completions", {"prompt": [1] * 100_000}, "prompt"),
        ("completions", {"prompt": [[1], [1] * 100_000]}, "prompt"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x" * 500_000}]},
            "messages",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "long text " * 40}] * 1000},
            "messages",
        ),
    ],
)
def test_what_cannot_fit_is_refused_without_tokenizing_it(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], what: str
) -> None:
    encode = Tokenizer.encode

    def short(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
        assert len(text) < 5000
        return encode(tokenizer, text, special=special)

    monkeypatch.setattr(Tokenizer, "encode", short)
    error = served.refusal(f"/v1/{path}", **body)
    assert error["code"] == "context_length_exceeded"
    assert error["type"] == "exceed_context_size_error"
    assert error["param"].startswith(what)
    assert error["message"].startswith("This model's maximum context length is 128 tokens. However")
    assert "your prompt is too long: " in error["message"]
    assert f"Please reduce the length of the {what}." in error["message"]


def test_what_may_fit_is_tokenized_only_until_it_cannot(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = Tokenizer.encode

    def noting(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
        seen.append(len(text))
        return encode(tokenizer, text, special=special)

    with serving_small(folder) as served:
        monkeypatch.setattr(served.service.token_bound, "_characters", None)
        monkeypatch.setattr(Tokenizer, "encode", noting)
        error = served.refusal(prompt="word " * 200_000)
    assert "resulted in at least" in error["message"]
    assert sum(seen) < 300_000


def test_long_prompts_are_read_one_at_a_time_and_others_go_on(served: Served, slow: Slow) -> None:
    with ThreadPoolExecutor(6) as pool:
        body = {"prompt": "x" * LONG}
        late = [pool.submit(served.post, "/v1/completions", body) for _ in range(3)]
        late.append(pool.submit(served.post, "/tokenize", {"prompt": "x" * LONG}))
        wait_until(lambda: slow.now == 1)
        for _ in range(3):
            start = time.monotonic()
            assert served.get("/health").status_code == 200
            assert served.complete(max_tokens=3)["choices"]
            assert served.post("/tokenize", {"prompt": "short"}).status_code == 200
            assert time.monotonic() - start < 5  # the gate waits for 20
        slow.gate.set()
        assert [each.result().status_code for each in late] == [400, 400, 400, 200]
    assert slow.most == 1
    wait_until(lambda: not served.service.state.busy)


def test_no_more_long_bodies_are_in_memory_than_may_be(served: Served, slow: Slow) -> None:
    with ThreadPoolExecutor(5) as pool:
        body = {"prompt": "x" * LONG}
        late = [pool.submit(served.post, "/v1/completions", body) for _ in range(4)]
        wait_until(lambda: served.service.state.thorough._under_way == 4)
        response = served.post("/v1/completions", body)  # waits a second for a place
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "busy"
        assert int(response.headers["retry-after"]) >= 1
        slow.gate.set()
        assert [each.result().status_code for each in late] == [400] * 4
    assert served.post("/v1/completions", {"prompt": "x" * LONG}).status_code == 400


def test_a_deadline_holds_while_a_prompt_is_read(folder: Path, slow: Slow) -> None:
    limits = Limits(brief_bytes=5000, reply_seconds=0.3)
    with serving_small(folder, limits=limits) as served:
        for stream in (False, True):
            start = time.monotonic()
            asked = {"prompt": "x" * LONG, "stream": stream}
            response = served.post("/v1/completions", asked)
            assert time.monotonic() - start < 5
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "deadline_exceeded"
            assert "was given 0.3 seconds, and it was not read" in response.text
        assert slow.calls == 1  # the second one waited for the first, and was taken away
        slow.gate.set()
        wait_until(lambda: not served.service.state.busy)
        assert slow.calls == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_holds_while_storage_is_slow(folder: Path, stream: bool) -> None:
    runtime = GatedRuntime()
    with serving_small(folder, runtime, limits=Limits(reply_seconds=0.3)) as served:
        runtime.gate.clear()
        start = time.monotonic()
        response = served.post("/v1/completions", {"prompt": "x", "stream": stream})
        assert time.monotonic() - start < 5
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert served.get("/health").json()["status"] == "ok"
        runtime.gate.set()
        served.settled()
        assert served.complete(max_tokens=1)


def test_who_leaves_while_its_prompt_waits_is_not_read(served: Served, slow: Slow) -> None:
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(served.post, "/v1/completions", {"prompt": "x" * LONG})
        wait_until(lambda: slow.now == 1)
        found = served.ask_raw({"prompt": "y" * LONG})
        wait_until(lambda: served.service.state.thorough._under_way == 2)
        found.close()
        wait_until(lambda: served.service.state.thorough._under_way == 1)
        slow.gate.set()
        assert late.result().status_code == 400
    assert slow.calls == 1


def test_texts_for_their_own_sake_are_bounded(served: Served) -> None:
    error = served.refusal("/tokenize", prompt="x" * 9001)
    assert error["message"] == "prompt has 9001 characters, expected at most 9000."
    assert served.post("/tokenize", {"prompt": "x" * 9000}).json()["count"] == 9000
    error = served.refusal("/detokenize", tokens=[1] * 51)
    assert error["message"] == "tokens is a list of 51, expected a list of at most 50."
    assert served.post("/detokenize", {"tokens": [1] * 50}).status_code == 200


def schema(number: int) -> dict[str, Any]:
    found = {"name": "x", "schema": {"const": number}}
    return {"response_format": {"type": "json_schema", "json_schema": found}, "max_tokens": 4}


def test_new_schemas_wait_for_each_other_and_nobody_else_does(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.complete(**schema(0))
    gate, tried = threading.Event(), []

    def slowly(text: str, noun: str) -> None:
        tried.append(text)
        gate.wait(20)

    monkeypatch.setattr(grammar, "_try_out", slowly)
    with ThreadPoolExecutor(2) as pool:
        late = [pool.submit(served.complete, **schema(each)) for each in (1, 2)]
        wait_until(lambda: served.service.schemas._under_way == 2)
        start = time.monotonic()
        response = served.post("/v1/completions", {"prompt": "x", **schema(3)})
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "busy"
        assert int(response.headers["retry-after"]) >= 1
        assert served.complete(**schema(0)), "one that is known already"
        assert served.complete(response_format={"type": "json_object"}, max_tokens=3)
        assert served.complete(max_tokens=3)
        assert served.get("/health").status_code == 200
        assert time.monotonic() - start < 5
        assert len(tried) == 1
        gate.set()
        assert all(each.result() for each in late)
    assert served.complete(**schema(3))


def test_a_lane_hands_on_what_was_raised_and_counts_what_is_under_way() -> None:
    class Panic(BaseException):
        pass

    def fail(error: BaseException) -> None:
        raise error

    async def use() -> None:
        lane, gate = Lane("tests", 1, waiting=0), threading.Event()
        assert await lane.run(lambda: 3) == 3
        with pytest.raises(KeyError):
            await lane.run(fail, KeyError("x"))
        with pytest.raises(Exception, match="Panic: out of bounds"):
            await lane.run(fail, Panic("out of bounds"))
        await asyncio.to_thread(wait_until, lambda: not lane.busy)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await lane.run(gate.wait, 20)
        assert lane.busy
        with pytest.raises(ApiError, match="1 tests are under way or wait already"):
            await lane.run(lambda: 3)
        gate.set()
        await asyncio.to_thread(wait_until, lambda: not lane.busy)

    asyncio.run(use())


def test_a_zipped_body_is_read(served: Served) -> None:
    content = gzip.compress(json.dumps({"prompt": "Hello", "max_tokens": 2}).encode())
    for encoding in ("gzip", "GZIP", "x-gzip"):
        headers = {"content-encoding": encoding}
        response = served.post("/v1/completions", content, headers=headers)
        assert response.json()["usage"]["prompt_tokens"] == 5
    response = served.post("/tokenize", content, headers={"content-encoding": "identity"})
    assert response.status_code == 400  # as it is, it is no JSON


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        pytest.param(gzip.compress(b" " * (20 << 20)), 413, "more than 1048576 bytes", id="bomb"),
        pytest.param(ZIPPED[:-5], 400, "not what gzip makes", id="without its end"),
        pytest.param(ZIPPED[:12], 400, "not what gzip makes", id="its beginning"),
        pytest.param(b'{"prompt": "x"}', 400, "not what gzip makes", id="not zipped"),
        pytest.param(ZIPPED + b"more", 400, "not what gzip makes", id="more behind it"),
        pytest.param(b"", 400, "not valid JSON", id="empty"),
    ],
)
def test_a_zipped_body_that_is_none(
    served: Served, content: bytes, status: int, message: str
) -> None:
    headers = {"content-encoding": "gzip"}
    response = served.post("/v1/completions", content, headers=headers)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip"])
def test_other_encodings_are_refused_by_name(served: Served, encoding: str) -> None:
    headers = {"content-encoding": encoding}
    response = served.post("/v1/completions", {"prompt": "x"}, headers=headers)
    assert response.status_code == 415
    assert f"'{encoding}', expected gzip" in response.json()["error"]["message"]
    assert response.headers["accept-encoding"] == "gzip"


def test_a_long_body_without_a_length_is_read(served: Served) -> None:
    content = json.dumps({"prompt": [1] * 100, "max_tokens": 1, "user": "u" * 200}).encode()
    content += b" " * 20_000
    parts = (content[at : at + 1000] for at in range(0, len(content), 1000))
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{served.url}/v1/completions", content=parts, headers=headers)
    assert response.json()["usage"]["prompt_tokens"] == 100


def test_who_asks_before_sending_is_told_to_go_on(served: Served) -> None:
    content = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: %s\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
    )
    with served.connect() as found:
        found.sendall(head % (b"application/json", len(content)))
        assert found.recv(1000).startswith(b"HTTP/1.1 100 ")
        found.sendall(content)
        assert found.recv(1000).startswith(b"HTTP/1.1 200 ")
    with served.connect() as found:
        found.sendall(head % (b"text/plain", len(content)))
        assert found.recv(1000).startswith(b"HTTP/1.1 415 ")


def ask_for_health(found: socket.socket) -> None:
    """Ask on a connection, and read all of the answer."""
    found.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    received = b""
    while not received.endswith(b"}"):
        received += found.recv(65536)
    assert received.startswith(b"HTTP/1.1 200 ")


def test_a_connection_may_be_idle_for_longer_than_a_header_may_take(served: Served) -> None:
    with served.connect() as found:
        for _ in range(2):
            ask_for_health(found)
            time.sleep(2 * LIMITS.header_seconds)
        found.sendall(b"GET /heal")
        assert found.recv(65536) == b""
    assert Limits().idle_seconds > 60  # what balancers keep theirs for


def test_idle_connections_make_room_for_new_ones(folder: Path) -> None:
    with serving_small(folder, limits=Limits(connections=3)) as served:
        held = [served.connect() for _ in range(3)]
        for each in held:
            ask_for_health(each)
        assert served.get("/health").status_code == 200
        for each in held:
            each.close()


def test_an_idle_connection_is_closed_in_the_end(folder: Path) -> None:
    limits = Limits(idle_seconds=0.2)
    with serving_small(folder, limits=limits) as served, served.connect() as found:
        ask_for_health(found)
        assert found.recv(65536) == b""
