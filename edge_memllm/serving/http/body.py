"""The body of a request: bounded in size, time and depth, and exactly one JSON object."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

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


async def read_object(request: Request, limits: Limits) -> dict[str, object]:
    """Return the object that the body holds. Raises `ApiError`, or `ClientDisconnect`."""
    _check_type(request)
    try:
        async with asyncio.timeout(limits.body_seconds):
            data = await _read(request, limits.body_bytes)
    except TimeoutError:
        message = f"The body did not come within {limits.body_seconds:g} seconds."
        raise ApiError(408, message, headers=_CLOSE) from None
    try:
        value = parse_json_object(data, "the body", limits.body_bytes)
    except ArtifactError as error:
        raise ApiError(400, str(error), code="invalid_json") from None
    _check_depth(value, limits.body_depth)
    return value


def _check_type(request: Request) -> None:
    found = request.headers.get("content-type", "application/json")
    if found.partition(";")[0].strip().lower() != "application/json":
        message = f"The body is declared as {ascii(found)[:80]}, expected application/json."
        raise ApiError(415, message, headers=_CLOSE)


async def _read(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > _PATIENCE * most:
        raise _too_large(most, _CLOSE)
    data, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            data += part
        elif size > _PATIENCE * most:
            raise _too_large(most, _CLOSE)
    if size > most:
        raise _too_large(most)
    return bytes(data)


def _too_large(most: int, headers: Mapping[str, str] | None = None) -> ApiError:
    return ApiError(413, f"The body has more than {most} bytes.", headers=headers)


def _check_depth(value: object, most: int) -> None:
    """Refuse what is nested more deeply than the code that reads it later can bear."""
    level: list[object] = [value]
    for _ in range(most):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    message = f"The body has more than {most} objects and lists inside one another."
    raise ApiError(400, message, code="invalid_json")


def _inside(value: object) -> Iterable[object]:
    found: Iterable[object] = ()
    if isinstance(value, dict):
        found = value.values()
    elif isinstance(value, list):
        found = value
    return (each for each in found if isinstance(each, dict | list))
