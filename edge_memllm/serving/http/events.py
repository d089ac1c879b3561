"""Server-sent events: text chunks of one kind, with comments to keep a waiting line open."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Send

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy in between must not collect them
]
DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"


def event(value: Any) -> bytes:
    """Return an event that carries JSON, which never holds a line break."""
    return b"data: " + json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream:
    """A response under way; it begins with the first event."""

    def __init__(self, send: Send) -> None:
        self.begun = False
        self._send = send

    async def put(self, data: bytes) -> None:
        """Send an event."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
