"""The body of a request: bounded in size, time and depth, and exactly one JSON object.

A body that is not brief takes one of a few places before it is read, and keeps it until nothing of
it is needed any more: so that however many come at once, memory holds a few.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from io import BytesIO
from typing import NamedTuple, NoReturn

from starlette.requests import Request

from edge_memllm.errors import ArtifactError
from edge_memllm.serving.http.api_error import ApiError
from edge_memllm.serving.http.settings import Limits
from edge_memllm.strict_json import parse_json_object

# The rest of a body that is not read must not be taken for the next request.
_CLOSE = {"Connection": "close"}
# A body this many times too large is read to its end, and thrown away, so that its sender gets to
# read why; many clients that are cut off while they send never see an answer.
_PATIENCE = 8
_PLAIN = ("", "identity")
_ZIPPED = ("gzip", "x-gzip")
_RETRY_SECONDS = 2


class Body(NamedTuple):
    """What was sent."""

    data: bytes
    zipped: bool
    brief: bool  # so short that reading it is quickly done


@asynccontextmanager
async def received(
    request: Request, limits: Limits, places: asyncio.Semaphore
) -> AsyncIterator[Body]:
    """Give the body of a request; `places` bounds how many there are that are not brief.

    Raises `ApiError`, or `ClientDisconnect`.
    """
    _check_type(request)
    zipped = _is_zipped(request)
    declared = _declared(request, limits.body_bytes)
    async with AsyncExitStack() as stack:
        data = bytearray()
        brief = declared <= limits.brief_bytes and not zipped
        parts = await stack.enter_async_context(aclosing(request.stream()))
        if brief:
            brief = await _read(parts, data, limits.brief_bytes, _until(limits))
        if not brief:
            await _take_place(places, limits.body_seconds)
            stack.callback(places.release)
            until = _until(limits)
            if not await _read(parts, data, limits.body_bytes, until):
                await _read_in_vain(parts, limits.body_bytes, until)
        yield Body(bytes(data), zipped, brief)


def parsed(body: Body, limits: Limits) -> dict[str, object]:
    """Return the object that a body holds; this takes a while for long ones. Raises `ApiError`."""
    data = _unzipped(body.data, limits.body_bytes) if body.zipped else body.data
    try:
        return parse_json_object(data, "the body", limits.body_bytes)
    except ArtifactError as error:
        raise ApiError(400, str(error), code="invalid_json") from None


def _check_type(request: Request) -> None:
    found = request.headers.get("content-type", "application/json")
    if found.partition(";")[0].strip().lower() != "application/json":
        message = f"The body is declared as {ascii(found)[:80]}, expected application/json."
        raise ApiError(415, message, headers=_CLOSE)


def _is_zipped(request: Request) -> bool:
    found = request.headers.get("content-encoding", "").strip().lower()
    if found in _PLAIN:
        return False
    if found in _ZIPPED:
        return True
    message = f"The body is encoded as {ascii(found)[:80]}, expected gzip, or as it is."
    raise ApiError(415, message, headers={**_CLOSE, "Accept-Encoding": "gzip"})


def _declared(request: Request, most: int) -> int:
    """Return how long the body is said to be, 0 if it is not said."""
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdecimal() else 0
    if length > _PATIENCE * most:
        raise _too_large(most, _CLOSE)
    return length


async def _take_place(places: asyncio.Semaphore, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await places.acquire()
    except TimeoutError:
        message = "Too many long requests are being read already. Try again."
        after = {"Retry-After": str(_RETRY_SECONDS), **_CLOSE}
        raise ApiError(429, message, code="busy", headers=after) from None


class _Until(NamedTuple):
    """When a body has to be there."""

    time: float  # of the event loop
    seconds: float  # from when it began


def _until(limits: Limits) -> _Until:
    seconds = limits.body_seconds
    return _Until(asyncio.get_running_loop().time() + seconds, seconds)


async def _read(
    parts: AsyncGenerator[bytes, None], data: bytearray, most: int, until: _Until
) -> bool:
    """Append parts of a body; False once there are more than `most` bytes, and more may come."""
    try:
        async with asyncio.timeout_at(until.time):
            async for part in parts:
                data += part
                if len(data) > most:
                    return False
    except TimeoutError:
        message = f"The body did not come within {until.seconds:g} seconds."
        raise ApiError(408, message, headers=_CLOSE) from None
    return len(data) <= most


async def _read_in_vain(parts: AsyncGenerator[bytes, None], most: int, until: _Until) -> NoReturn:
    """Throw away what is too large; raises the `ApiError` that says so."""
    left, dropped = _PATIENCE * most, bytearray()
    while not await _read(parts, dropped, 0, until):
        left -= len(dropped)
        dropped.clear()
        if left < 0:
            raise _too_large(most, _CLOSE)
    raise _too_large(most)


def _unzipped(data: bytes, most: int) -> bytes:
    """Return what a zipped body holds, up to a little more than there may be."""
    try:
        with gzip.GzipFile(fileobj=BytesIO(data)) as file:
            found = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ApiError(400, f"The body is not what gzip makes ({error}).") from None
    if len(found) > most:
        raise _too_large(most)
    return found


def _too_large(most: int, headers: Mapping[str, str] | None = None) -> ApiError:
    return ApiError(413, f"The body has more than {most} bytes.", headers=headers)
