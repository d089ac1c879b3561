"""Who is let in: names, pages, keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.errors import RequestError
from edge_memllm.server.guard import (
    checked_host,
    checked_origin,
    is_loopback,
    missing_protection,
)
from edge_memllm.server.settings import Settings
from support.server import Served, serving_small

KEYS = ("first-long-key", "second-long-key")
ORIGIN = "https://example.org"


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[Served]:
    with serving_small(folder) as found:
        yield found


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Served]:
    with serving_small(folder, api_keys=KEYS, origins=(ORIGIN,), hosts=("ai.lan",)) as found:
        yield found


def status(served: Served, path: str = "/v1/models", **headers: str) -> int:
    return served.get(path, headers=headers).status_code


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.2:1", "[::1]:80", "a.localhost"]
)
def test_the_loopbacks_names_are_good(plain: Served, host: str) -> None:
    assert status(plain, host=host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "192.168.1.5",
        "1",
        "x]y",
        "::",
    ],
)
def test_a_rebound_name_is_not(plain: Served, host: str) -> None:
    response = plain.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "unknown_host"
    assert "--allow-host NAME" in response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["evil.example", "10.0.3.7:8080", "x]y"])
def test_health_is_told_under_any_name(plain: Served, host: str) -> None:
    assert status(plain, "/health", host=host) == 200
    with plain.connect() as found:
        found.sendall(b"HEAD /health HTTP/1.0\r\n\r\n")
        assert found.recv(100).startswith(b"HTTP/1.1 200 ")


def test_further_names_are_good_where_they_are_given(locked: Served) -> None:
    key = {"authorization": f"Bearer {KEYS[0]}"}
    assert status(locked, host="ai.lan", **key) == 200
    assert status(locked, host="AI.lan:9", **key) == 200
    assert status(locked, host="localhost", **key) == 200
    assert status(locked, host="ai.lan.evil.example", **key) == 403


def test_pages_of_this_server_may_ask_and_others_not(plain: Served) -> None:
    assert status(plain, origin=plain.url) == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"):
        response = plain.get("/v1/models", headers={"origin": origin})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "unknown_origin"
        assert "access-control-allow-origin" not in response.headers


def test_a_preflight_is_answered_for_those_that_may(locked: Served, plain: Served) -> None:
    import httpx

    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    allowed = httpx.options(f"{locked.url}/v1/completions", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    other = {**asked, "origin": "https://evil.example"}
    refused = httpx.options(f"{locked.url}/v1/completions", headers=other)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    assert httpx.options(f"{plain.url}/v1/completions", headers=asked).status_code == 403


def test_pages_that_may_ask_can_read_errors_too(locked: Served) -> None:
    response = locked.get("/v1/models", headers={"origin": ORIGIN})
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (f"Bearer {KEYS[0]}", 200),
        (f"bearer   {KEYS[1]}", 200),
        (f"Bearer {KEYS[0][:-1]}", 401),
        (f"Bearer {KEYS[0]}x", 401),
        (f"Basic {KEYS[0]}", 401),
        (KEYS[0], 401),
        ("Bearer", 401),
        ("", 401),
    ],
)
def test_keys(locked: Served, authorization: str, expected: int) -> None:
    response = locked.get("/v1/models", headers={"authorization": authorization})
    assert response.status_code == expected
    if expected == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/completions", "/metrics", "/tokenizer_info", "/nothing", "//health"]
)
def test_everything_but_health_and_page_needs_a_key(locked: Served, path: str) -> None:
    assert status(locked, path) == 401
    assert status(locked, "/health") == 200
    assert locked.post("/health", {}).status_code == 401


def test_clients_are_told_apart_by_key_or_address(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_memllm.engine import Engine

    seen: list[str] = []
    submit = Engine.submit

    def noting(self: Engine, request: Any) -> Any:
        seen.append(request.client)
        return submit(self, request)

    monkeypatch.setattr(Engine, "submit", noting)
    with serving_small(folder, api_keys=KEYS) as served:
        for key in KEYS:
            headers = {"authorization": f"Bearer {key}"}
            served.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers=headers)
    with serving_small(folder) as served:
        served.complete(max_tokens=1, user="me")
    assert seen == ["key 0", "key 1", "127.0.0.1/me"]


def test_what_is_open_to_others_is_said_loudly() -> None:
    warnings = list(missing_protection(Settings("m", addresses=("0.0.0.0",), origins=("*",))))
    assert "anybody who reaches 0.0.0.0 can use this server: it has no API key" in warnings[0]
    assert "pages of every web site" in warnings[1]
    assert not list(missing_protection(Settings("m", addresses=("0.0.0.0",), api_keys=KEYS)))
    assert not list(missing_protection(Settings("m", addresses=("::1", "unix:/run/m.sock"))))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.8.9.1", True), ("::1", True), ("localhost.", True), ("", False), ("0.0.0.0", False)],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "https://example.org",
            "http://localhost:3000",
            "https://a.b-c.d:8443",
            "http://[::1]:90",
        ),
        *("http://127.0.0.1", "chrome-extension://abc", "tauri://localhost", "*", "null"),
        "https://xn--bcher-kva.example",
    ],
)
def test_origins_that_browsers_send(folder: Path, origin: str) -> None:
    assert checked_origin(origin) == origin
    if origin != "*":
        with serving_small(folder, origins=(origin,)) as served:
            assert status(served, origin=origin) == 200


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("https://example.org/", "https://example.org"),
        ("HTTPS://Example.org", "https://example.org"),
        ("https://example.org:443", "https://example.org"),
        ("http://example.org:80", "http://example.org"),
        ("http://example.org:080", "http://example.org"),
        ("http://[0:0::1]:90", "http://[::1]:90"),
        ("https://b\u00fccher.example", "https://xn--bcher-kva.example"),
    ],
)
def test_origins_written_as_browsers_do_not_are_corrected(given: str, sent: str) -> None:
    with pytest.raises(RequestError, match="never matches: browsers call that origin") as refused:
        checked_origin(given)
    assert f"{sent}. Give that." in str(refused.value)
    assert checked_origin(sent) == sent


@pytest.mark.parametrize(
    "given",
    [
        *("", "example.org", "localhost:3000", "//example.org", "https://", "https:///", "file://"),
        *("https://*.example.org", "https://*", "https://example.org/app", "https://a?b", "a b"),
        *("https://me@example.org", "https://example.org:99999", "https://example.org:0"),
        *("https://-a", "https://a..b", "https://a,https://b", "https://example.org:"),
    ],
)
def test_what_is_no_origin_is_refused(given: str) -> None:
    with pytest.raises(RequestError, match=r"is no origin.*expected one like https://example\.org"):
        checked_origin(given)


@pytest.mark.parametrize("name", ["ai.lan", "AI.Lan", "192.168.1.5", "[fe80::1]", "a_b", "ai.lan."])
def test_names_that_clients_send(folder: Path, name: str) -> None:
    with serving_small(folder, hosts=(checked_host(name),)) as served:
        assert status(served, host=name) == 200
        assert status(served, host=f"{name}:80") == 200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ai.lan:80", r"ports are not compared\. Give ai\.lan\."),
        ("[::1]:80", r"ports are not compared\. Give \[::1\]\."),
        ("fe80::0:1", r"clients write that name \[fe80::1\]\. Give that"),
        ("b\u00fccher.example", r"clients write that name xn--bcher-kva\.example\. Give that"),
        ("", "expected a name like"),
        ("http://ai.lan", "no scheme, no path"),
        ("ai.lan/", "no scheme, no path"),
        ("*", "expected a name like"),
        ("*.lan", "expected a name like"),
        ("a b", "expected a name like"),
        ("a,b", "Repeat the option for several"),
    ],
)
def test_names_that_no_client_sends_are_refused(given: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"never matches.*{message}"):
        checked_host(given)
