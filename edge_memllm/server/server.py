"""A server that ends well: what is under way is finished by a deadline, then it goes.

Puts the application on uvicorn. The first signal drains; the second is the system's, which ends
the process at once.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType

import uvicorn
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import HANDLED_SIGNALS, ServerState

from edge_memllm.errors import RequestError
from edge_memllm.process.interrupts import taking_one
from edge_memllm.server.application import application
from edge_memllm.server.fields import ApiError
from edge_memllm.server.models import ServedModels
from edge_memllm.server.settings import UNIX, Limits

_RETRY_SECONDS = 1

_log = logging.getLogger(__name__)

# Bytes of a request's header.
HEADER_BYTES = 16 << 10
BACKLOG = 512
# After the engine has given up, replies still have to be written.
_GRACE_SECONDS = 3


class PatientProtocol(H11Protocol):
    """One connection. Closed when its client takes too long for a header, or to read."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a header, if there is room for one more."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections and not self._close_an_idle_one():
            transport.write(_no_room())
            transport.close()
        self._watch_header()

    @property
    def idle(self) -> bool:
        """Whether the last request was answered and nothing of another has come."""
        return self.timeout_keep_alive_task is not None

    def data_received(self, data: bytes) -> None:
        """Take some bytes; once they make a header, its time is no longer counted."""
        super().data_received(data)
        self._watch_header()

    def on_response_complete(self) -> None:
        """Begin to be idle, or to wait for the last bytes to be read."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reader()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is sent to."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self._stop_send_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers with the connection."""
        super().connection_lost(exc)
        self._stop_header_timer()
        self._stop_send_timer()

    def _close_an_idle_one(self) -> bool:
        """Make room at the expense of a client that only keeps its connection for later."""
        for other in self.connections:
            if isinstance(other, PatientProtocol) and other.idle:
                other.transport.close()
                return True
        return False

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
        self._header_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
        self._send_timer = None

    def _watch_reader(self) -> None:
        if self._send_timer is None:
            seconds = self._limits.send_seconds
            self._send_timer = self.loop.call_later(seconds, self.transport.abort)

    def _watch_header(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._stop_header_timer()
        elif self._header_timer is None:
            seconds = self._limits.header_seconds
            self._header_timer = self.loop.call_later(seconds, self.transport.abort)


def _no_room() -> bytes:
    error = ApiError(503, "Too many connections are open. Try again.", code="connections")
    body = json.dumps(error.body()).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Retry-After: {_RETRY_SECONDS}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


@contextmanager
def bound_sockets(addresses: Sequence[str], port: int) -> Iterator[list[socket.socket]]:
    """Hold all addresses; a free port is the same one for all. Raises `RequestError`."""
    with ExitStack() as stack:
        found: list[socket.socket] = []
        for address in addresses:
            if address.startswith(UNIX):
                bound = stack.enter_context(_unix_socket(address.removeprefix(UNIX)))
            else:
                bound = stack.enter_context(bound_socket(address, port))
                port = bound.getsockname()[1]
            found.append(bound)
        yield found


@contextmanager
def _unix_socket(path: str) -> Iterator[socket.socket]:
    """Hold a socket of this machine at a path, which is free again afterwards."""
    if not hasattr(socket, "AF_UNIX"):
        raise RequestError(f"{UNIX}{path} needs sockets with paths, which this system has not.")
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with found:
        try:
            _clear(path)
            found.bind(path)
        except OSError as error:
            raise RequestError(
                f"{UNIX}{path} cannot be used: {error.strerror or error}. Choose another path with "
                "--host."
            ) from error
        made = os.stat(path)
        try:
            yield found
        finally:
            with suppress(OSError):
                if os.path.samestat(made, os.stat(path)):  # not that of a server after this one
                    os.unlink(path)


def _clear(path: str) -> None:
    """Remove the socket of a server that has gone. Raises `OSError` where one answers."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return  # what is no socket is in the way, and stays
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that holds an address but does not listen yet; port 0 takes a free one.

    Raises `RequestError` for an address that cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Named, not 0: asyncio sends small writes at once only where it sees that this is TCP.
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RequestError(f"host is {host!r}, which is no address here: {error}.") from error
    try:
        if os.name == "posix":  # elsewhere it lets two programs take one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise RequestError(
            f"port {port} of {host} cannot be used: {error.strerror}. Choose another with --port."
        ) from error
    return found


class Server(uvicorn.Server):
    """Serves until it is told to end; `run(sockets=[...])` in a thread of the caller's choice."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models
        self.forced = False
        settings = models.state.settings
        super().__init__(
            uvicorn.Config(
                application(models),
                http=partial(PatientProtocol, limits=settings.limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=settings.limits.idle_seconds,  # type: ignore[arg-type]
                timeout_graceful_shutdown=round(settings.drain_seconds) + _GRACE_SECONDS,
                h11_max_incomplete_event_size=HEADER_BYTES,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the first signal, where this is the main thread."""
        with taking_one(HANDLED_SIGNALS, self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what is under way and end; asked for a second time, let go of it."""
        if self.should_exit:
            self.forced = self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, let the engine finish until the deadline, then end."""
        models, seconds = self._models, self._models.state.settings.drain_seconds
        _log.info("ending: replies under way have %g s", seconds)
        draining = asyncio.create_task(asyncio.to_thread(models.drain, seconds, _GRACE_SECONDS))
        await super().shutdown(sockets)
        if self.forced:
            await asyncio.to_thread(models.drain, 0.0, _GRACE_SECONDS)
        if not await draining:
            _log.warning("ended before all replies were finished")
