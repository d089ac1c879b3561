"""A server that ends well: what is under way is finished by a deadline, then it goes.

Puts the application on uvicorn. The first signal drains; the second is the system's, which ends
the process at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from edge_memllm.errors import RequestError
from edge_memllm.interrupts import taking_one
from edge_memllm.serving.http.application import application
from edge_memllm.serving.http.protocol import PatientProtocol
from edge_memllm.serving.http.service import Service

_log = logging.getLogger(__name__)

# Bytes of a request's header.
HEADER_BYTES = 16 << 10
BACKLOG = 512
# After the engine has given up, replies still have to be written.
_GRACE_SECONDS = 3


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

    def __init__(self, service: Service) -> None:
        self._service = service
        self.forced = False
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                application(service),
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
        engine, seconds = self._service.engine, self._service.settings.drain_seconds
        _log.info("ending: replies under way have %g s", seconds)
        draining = asyncio.create_task(asyncio.to_thread(engine.drain, seconds, _GRACE_SECONDS))
        await super().shutdown(sockets)
        if self.forced:
            await asyncio.to_thread(engine.close, _GRACE_SECONDS)
        if not await draining:
            _log.warning("ended before all replies were finished")
