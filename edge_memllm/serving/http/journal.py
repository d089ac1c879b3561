"""Around the whole application: names requests, counts them, and logs them where that is wished.

A line of the log never holds a prompt, a reply or a key, and nothing a client can break it with.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Collection
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_memllm.serving.http.api_error import REQUEST_ID
from edge_memllm.serving.http.metrics import Metrics

LOG = logging.getLogger(__name__)

_OTHER = "other"
_MOST_SHOWN = 200
_SAFE_HEADER = (b"x-content-type-options", b"nosniff")
_ID_HEADER = b"x-request-id"
_GOOD_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


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
