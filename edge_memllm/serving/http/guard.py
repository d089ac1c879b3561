"""Who may ask: the name the server is called by, the page that asks, and the key.

A page of any web site can send requests to this machine from the browser of whoever looks at it.
So a server on the loopback answers only to the loopback's names, which a rebound domain is not,
and no request of a foreign page is let in that was not asked for by name.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_memllm.serving.http.api_error import ApiError
from edge_memllm.serving.http.settings import Settings

ANY = "*"
# Without a key: what a monitor asks for, and the page, which asks its reader for the key.
OPEN_PATHS = ("/", "/health")
OPEN_FOLDER = "/page/"
_CLIENT = "edge_memllm.client"


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, reachable from nowhere else."""
    name = host.lower().strip("[]").rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def client_of(scope: Scope) -> str:
    """Return whose turn a request takes: that of a key, or of an address without keys."""
    found: str = scope.get(_CLIENT, "")
    return found


class Guard:
    """ASGI middleware that lets requests in, or answers why not."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._any_host = not is_loopback(settings.host) and not settings.hosts
        self._hosts = frozenset(name.lower() for name in settings.hosts)
        self._origins = settings.origins
        self._keys = tuple(map(_digest, settings.api_keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on."""
        try:
            scope[_CLIENT] = self._admitted(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admitted(self, scope: Scope) -> str:
        """Return whose turn a request takes; raises `ApiError` for one that may not come in."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._any_host:
            self._check_host(host)
        _check_origin(headers, host, self._origins)
        return self._client(scope, headers)

    def _check_host(self, host: str) -> None:
        name = _without_port(host)
        if not is_loopback(name) and name.lower() not in self._hosts:
            raise ApiError(
                403,
                f"This server does not go by the name {ascii(name)[:80]}. Call it by its address, "
                "or start it with --allow-host NAME.",
                code="unknown_host",
            )

    def _client(self, scope: Scope, headers: Headers) -> str:
        number = self._key(headers.get("authorization", ""))
        if number is not None:
            return f"key {number}"
        if self._keys and not _is_open(scope):
            raise ApiError(
                401,
                "This needs a key of this server, as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        address = scope.get("client")
        return address[0] if address else ""

    def _key(self, authorization: str) -> int | None:
        """Return the number of the key that was sent; takes as long for one as for another."""
        kind, _, given = authorization.partition(" ")
        sent = _digest(given.strip() if kind.lower() == "bearer" else "")
        matches = [hmac.compare_digest(sent, key) for key in self._keys]
        return matches.index(True) if any(matches) else None


def _check_origin(headers: Headers, host: str, allowed: Collection[str]) -> None:
    """Refuse what a browser sends for a page from elsewhere, unless that page may ask."""
    origin = headers.get("origin")
    if origin is None or ANY in allowed or origin in allowed:
        return
    if origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        raise ApiError(
            403,
            f"Pages from {ascii(origin)[:80]} may not use this server. Start it with --cors ORIGIN "
            "to let them.",
            code="unknown_origin",
        )


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (
        path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
    )


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and (port.isdecimal() or not port) and not name.endswith(":") else host


def _digest(key: str) -> bytes:
    """Return what stands for a key: of one length, so that comparing tells nothing of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def missing_protection(settings: Settings) -> Iterable[str]:
    """Yield what whoever starts a server like this has to be told."""
    if not is_loopback(settings.host) and not settings.api_keys:
        yield (
            f"anybody who reaches {settings.host} can use this server: it has no API key and "
            "listens beyond this machine. Give --api-key-file, or leave --host out."
        )
    if ANY in settings.origins:
        yield "pages of every web site may use this server: --cors '*' lets them."
