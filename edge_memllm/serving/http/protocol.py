"""HTTP/1.1 of uvicorn with the patience of `Limits`: slow headers, slow readers, too many at once.

uvicorn itself waits for ever for the header of a request, and for a client to read its reply; how
long a connection may be idle between two requests is its affair.
"""

from __future__ import annotations

import asyncio
import json

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from edge_memllm.serving.http.api_error import ApiError
from edge_memllm.serving.http.settings import Limits

_RETRY_SECONDS = 1


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
