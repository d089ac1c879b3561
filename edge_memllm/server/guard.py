"""Who may ask: the name the server is called by, the page that asks, and the key.

A page of any web site can send requests to this machine from the browser of whoever looks at it.
So a server on the loopback answers only to the loopback's names, which a rebound domain is not,
and no request of a foreign page is let in that was not asked for by name. Whoever asked, and what
became of it, is noted in the journal.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import uuid
from collections.abc import Collection, Iterable
from time import perf_counter

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_memllm.errors import RequestError
from edge_memllm.server.fields import REQUEST_ID, ApiError
from edge_memllm.server.service import Metrics
from edge_memllm.server.settings import UNIX, Settings

ANY = "*"
# Without a key: what a monitor asks for, and the page, which asks its reader for the key.
OPEN_FOLDER = "/page/"
# Balancers and orchestrators ask for it by whatever address they have; it tells next to nothing.
HEALTH = "/health"
_CLIENT = "edge_memllm.client"
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#@\s]+)")
_LABELS = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_USUAL_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}

LOG = logging.getLogger(__name__)

_OTHER = "other"
_MOST_SHOWN = 200
_SAFE_HEADER = (b"x-content-type-options", b"nosniff")
_ID_HEADER = b"x-request-id"
_GOOD_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


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
        self._any_host = bool(_beyond(settings)) and not settings.hosts
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
        if not self._any_host and scope["path"] != HEALTH:
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
        number = self._key(headers.get("authorization", ""), headers.get("x-api-key", ""))
        if number is not None:
            return f"key {number}"
        if self._keys and not _is_open(scope):
            raise ApiError(
                401,
                "This needs a key, as 'Authorization: Bearer KEY', or 'x-api-key: KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        address = scope.get("client")
        return address[0] if address else ""

    def _key(self, authorization: str, plain: str) -> int | None:
        """Return the number of the key that was sent; takes as long for one as for another.

        `plain` is how Anthropic's clients send it.
        """
        kind, _, given = authorization.partition(" ")
        sent = _digest(given.strip() if kind.lower() == "bearer" else plain.strip())
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


def checked_origin(text: str) -> str:
    """Return an origin as browsers send it. Raises `RequestError` for what none ever sends.

    That is a scheme, a host and a port that is not the usual one, in lower case, and nothing more.
    """
    if text in (ANY, "null"):
        return text
    found = _ORIGIN.fullmatch(text.strip().lower().rstrip("/"))
    expected = "expected one like https://example.org or http://localhost:3000, or '*' for any"
    if found is None:
        raise RequestError(f"--cors {text!a:.80} is no origin, {expected}.")
    scheme, authority = found.groups()
    name, port = _split_port(authority)
    host = _browsers_host(name)
    if host is None or (port is not None and not 0 < port < 1 << 16):
        raise RequestError(f"--cors {text!a:.80} is no origin: no host is called that, {expected}.")
    usual = port is None or port == _USUAL_PORTS.get(scheme)
    sent = f"{scheme}://{host}" if usual else f"{scheme}://{host}:{port}"
    if sent != text:
        raise RequestError(
            f"--cors {text!a:.80} never matches: browsers call that origin {sent}. Give that."
        )
    return sent


def checked_host(text: str) -> str:
    """Return a name that requests may call the server by. Raises `RequestError` if none ever will.

    Names are compared whole, without port and without regard to case.
    """
    name, port = _split_port(text.lower())
    host = _browsers_host(name)
    if port is not None and host is not None:
        raise RequestError(
            f"--allow-host {text!a:.80} never matches: ports are not compared. Give {host}."
        )
    if host is None:
        raise RequestError(
            f"--allow-host {text!a:.80} never matches, expected a name like ai.example.org, or an "
            "address: no scheme, no path, no '*'. Repeat the option for several."
        )
    if host != text.lower():
        raise RequestError(
            f"--allow-host {text!a:.80} never matches: clients write that name {host}. Give that."
        )
    return host


def _split_port(authority: str) -> tuple[str, int | None]:
    """Return the name and the port, if there is one; a lone IPv6 address has none."""
    name, colon, port = authority.rpartition(":")
    if colon and port.isascii() and port.isdecimal() and (":" not in name or name.endswith("]")):
        return name, int(port[:6])
    return authority, None


def _browsers_host(name: str) -> str | None:
    """Return a host as it is written in requests; None for what is none."""
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        pass
    else:
        return f"[{address}]" if address.version == 6 else str(address)
    try:
        ascii_name = name.encode("ascii" if name.isascii() else "idna").decode("ascii")
    except UnicodeError:
        return None
    return ascii_name if _LABELS.fullmatch(ascii_name.removesuffix(".")) else None


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (
        path in ("/", HEALTH) or path.startswith(OPEN_FOLDER)
    )


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and (port.isdecimal() or not port) and not name.endswith(":") else host


def _digest(key: str) -> bytes:
    """Return what stands for a key: of one length, so that comparing tells nothing of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _beyond(settings: Settings) -> list[str]:
    """Return the addresses that can be reached from other machines."""
    return [
        each for each in settings.listens if not each.startswith(UNIX) and not is_loopback(each)
    ]


def missing_protection(settings: Settings) -> Iterable[str]:
    """Yield what whoever starts a server like this has to be told."""
    beyond = _beyond(settings)
    if beyond and not settings.api_keys:
        yield (
            f"anybody who reaches {' or '.join(beyond)} can use this server: it has no API key and "
            "listens beyond this machine. Give --api-key-file, or leave --host out."
        )
    if ANY in settings.origins:
        yield "pages of every web site may use this server: --cors '*' lets them."


class Journal:
    """ASGI application around another. `paths` are those that are counted by name."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and note what became of it."""
        status, start = 0, perf_counter()
        name = _id_of(scope)
        REQUEST_ID.set(name)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (_SAFE_HEADER, (_ID_HEADER, name.encode()))
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        self._metrics.under_way += 1
        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.under_way -= 1
            self._note(scope, status, perf_counter() - start)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        self._metrics.note_response(path if path in self._paths else _OTHER, status)
        client = (scope.get("client") or ("?",))[0]
        shown = ascii(path)[1:-1][:_MOST_SHOWN]
        what = (client, scope["method"], shown, status or "left", seconds, REQUEST_ID.get())
        LOG.info("%s %s %s %s %.3f s %s", *what)


def _id_of(scope: Scope) -> str:
    """Return what a request is called: by its client, if that is fit to be written, or by us."""
    given: bytes = dict(scope["headers"]).get(_ID_HEADER, b"")
    return given.decode("ascii") if _GOOD_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
