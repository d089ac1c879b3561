"""The page at `/`: files that come with the package, read once and served under a strict policy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = "edge_memllm.serving.page"
INDEX = "index.html"
# What a page may do: load what stands beside it, and ask this server. Nothing inline, no frames.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
}


def page_routes(folder: Traversable | None = None) -> Iterator[Route]:
    """Yield a route for each file of the page, and `/` for its index."""
    for file in sorted((folder or files(FOLDER)).iterdir(), key=lambda each: each.name):
        kind = KINDS.get(PurePath(file.name).suffix)
        if kind is None:
            continue
        answer = _Answer(file.read_bytes(), kind)
        yield Route(f"/page/{file.name}", answer.respond)
        if file.name == INDEX:
            yield Route("/", answer.respond)


class _Answer:
    """One file; asked again, it is not sent again."""

    def __init__(self, content: bytes, kind: str) -> None:
        self._content = content
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._headers = {
            "Content-Security-Policy": POLICY,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
            "ETag": self._tag,
            "Content-Type": kind,
        }

    async def respond(self, request: Request) -> Response:
        """Send the file, or say that it is still the same."""
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)
