"""Clients that are broken or mean: bodies, bytes and connections. The server outlives them all."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.server.settings import Limits
from support.engine import wait_until
from support.server import Served, serving_small
from support.small_model import write_small_artifact

LIMITS = Limits(
    body_bytes=20_000,
    connections=20,
    header_seconds=0.4,
    body_seconds=0.4,
    send_seconds=0.4,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a").path
    with serving_small(folder, limits=LIMITS) as found:
        yield found
        found.complete(max_tokens=1)  # alive, after everything


def answer(found: socket.socket) -> bytes:
    """Everything the server has to say until it closes."""
    found.settimeout(5)
    received = b""
    try:
        while part := found.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "found a list of 0, expected a JSON object"),
        (b'"x"', "expected a JSON object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "key 'prompt' appears twice"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "x", "temperature": 1e999}', "too large for a float"),
        (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", "nested too deeply"),
        (
            b'{"prompt": "x", "stop": ' + b"[" * 70 + b"]" * 70 + b"}",
            "nested too deeply",
        ),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "x", "user": "\\udfff"}', "half of a surrogate pair"),
    ],
)
def test_a_broken_body_is_refused(served: Served, body: bytes, message: str) -> None:
    response = served.post("/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert re.search(message, response.json()["error"]["message"])


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_answered(served: Served, body: bytes) -> None:
    assert served.post("/v1/completions", body).status_code == 400
    assert served.post("/tokenize", body).status_code == 400


def test_a_body_of_another_kind_is_refused(served: Served) -> None:
    headers = {"content-type": "text/plain"}
    response = served.post("/v1/completions", {"prompt": "x"}, headers=headers)
    assert response.status_code == 415
    assert "'text/plain', expected application/json" in response.json()["error"]["message"]
    for good in ("application/json; charset=utf-8", "Application/JSON"):
        headers = {"content-type": good}
        assert served.post("/v1/completions", {"prompt": "x"}, headers=headers).status_code == 200


def test_a_giant_body_is_refused_before_it_is_read(served: Served) -> None:
    with served.connect() as found:
        found.sendall(HEAD + b"Content-Length: 1000000000000\r\n\r\n{")
        received = answer(found)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"The body has more than 20000 bytes." in received


def test_a_giant_body_without_a_length_is_refused_on_the_way(served: Served) -> None:
    with served.connect() as found:
        found.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            while True:
                found.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")


def test_who_sends_somewhat_too_much_can_read_why(served: Served) -> None:
    with httpx.Client(base_url=served.url) as client:
        for content in (b" " * 100_000, iter([b" " * 10_000] * 10)):
            headers = {"content-type": "application/json"}
            response = client.post("/v1/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert "more than 20000 bytes" in response.json()["error"]["message"]
            assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 70_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000,
    ],
)
def test_what_is_no_request_is_refused(served: Served, sent: bytes) -> None:
    with served.connect() as found:
        found.sendall(sent)
        received = answer(found)
    assert received[:13] == b"HTTP/1.1 400 "


def test_a_slow_header_is_not_waited_for(served: Served) -> None:
    start = time.monotonic()
    with served.connect() as found:
        found.sendall(b"GET /v1/models HT")
        assert answer(found) == b""
    assert time.monotonic() - start < 3
    with served.connect() as found:  # nor one whose client says nothing at all
        assert answer(found) == b""


def test_a_slow_second_header_is_not_waited_for_either(served: Served) -> None:
    with served.connect() as found:
        found.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert found.recv(65536).startswith(b"HTTP/1.1 200 ")
        found.sendall(b"GET /hea")
        assert b"HTTP" not in answer(found)


def test_a_slow_body_is_not_waited_for(served: Served) -> None:
    with served.connect() as found:
        found.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        received = answer(found)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"did not come within 0.4 seconds" in received


def test_a_client_that_does_not_read_is_let_go(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply larger than all buffers stays in the server's, until its patience ends."""
    monkeypatch.setattr(served.service, "fingerprint", "x" * 4_000_000)
    body = {"prompt": "Hello", "max_tokens": 20, "ignore_eos": True, "stream": True}
    with served.ask_raw(body):
        wait_until(lambda: served.service.metrics.under_way == 1)
        wait_until(lambda: served.service.metrics.under_way == 0)
        served.settled()


def test_too_many_connections_are_turned_away_and_come_back(served: Served) -> None:
    wait_until(lambda: not served.server.server_state.connections)
    held = [served.connect() for _ in range(LIMITS.connections)]
    try:
        wait_until(lambda: len(served.server.server_state.connections) == LIMITS.connections)
        with served.connect() as found:
            received = answer(found)
    finally:
        for each in held:
            each.close()
    assert received.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 1\r\n" in received
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "connections"
    wait_until(lambda: not served.server.server_state.connections)
    served.complete(max_tokens=1)


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with served.connect() as found:
        one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        last = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        found.sendall(one * 3 + last)
        received = answer(found)
    assert [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]] == [b"200"] * 3 + [b"404"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files by /proc")
def test_hundreds_of_disconnects_leak_nothing(served: Served) -> None:
    dice = random.Random(0)
    before = open_files()
    for number in range(300):
        body: dict[str, Any] = {"prompt": "x" * dice.randrange(1, 60), "max_tokens": 40}
        body |= {"stream": dice.random() < 0.5, "n": dice.choice([1, 1, 3]), "ignore_eos": True}
        found = served.ask_raw(body)
        if dice.random() < 0.3:
            found.recv(dice.randrange(1, 400))
        if dice.random() < 0.3:  # rudely: a reset instead of an end
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        found.close()
        if number % 50 == 49:
            served.settled()
    wait_until(lambda: not served.server.server_state.connections)
    wait_until(lambda: served.service.metrics.under_way == 0)
    served.settled()  # only now: a request may have been read when its client was gone
    assert open_files() <= before + 2
