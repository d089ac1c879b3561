"""What a client sent: its body received and parsed, its fields taken with type and range.

Whoever reads fields calls `finish` at the end, which refuses what was not taken: so nothing a
client asks for is ever ignored. A field that is null counts as left out. What cannot be taken, or
done, is an `ApiError`.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import math
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from edge_memllm.artifact.strict_json import parse_json_object
from edge_memllm.checked_values import Fields, described
from edge_memllm.errors import (
    ArtifactError,
    CorruptionError,
    DeadlineError,
    DrainingError,
    EdgeMemLLMError,
    QueueFullError,
    RequestError,
    RuntimeUnavailableError,
    StorageError,
)
from edge_memllm.server.parameters import Parameter
from edge_memllm.server.settings import Limits

_log = logging.getLogger(__name__)

# What the request that is being answered is called, in its answer and in the log.
REQUEST_ID = ContextVar("request_id", default="")
# Seconds after which a server that is ending has probably been started again.
RESTART_SECONDS = 5
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
_STORAGE = (StorageError, CorruptionError)

NOTHING: Mapping[str, Parameter] = {}
_SHOWN = 60

# The rest of a body that is not read must not be taken for the next request.
_CLOSE = {"Connection": "close"}
# A body this many times too large is read to its end, and thrown away, so that its sender gets to
# read why; many clients that are cut off while they send never see an answer.
_PATIENCE = 8
_PLAIN = ("", "identity")
_ZIPPED = ("gzip", "x-gzip")
_RETRY_SECONDS = 2


class ApiError(Exception):
    """What a client is told instead of a reply. `param` is the field at fault, if one is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        kind: str | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """Take what is told; `kind` stands in place of the status's own, `facts` beside it."""
        super().__init__(message)
        self.kind = kind or _KINDS.get(status, "invalid_request_error")
        self.facts = dict(facts or {})
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the object that stands for the error, in a response or in a stream."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
                "request_id": REQUEST_ID.get() or None,
                **self.facts,
            }
        }

    def response(self) -> Response:
        """Return the error as a response; in ASCII, whatever of a client's words it repeats."""
        content = json.dumps(self.body())
        return Response(content, self.status, self.headers, "application/json")


def refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error for a field of a request that cannot be taken as it is."""
    return ApiError(400, message, code=code, param=param)


@contextmanager
def blaming(param: str) -> Iterator[None]:
    """Turn a `RequestError` into the error that names the field it came from."""
    try:
        yield
    except RequestError as error:
        raise refused(param, _sentence(error)) from error


def explained(error: Exception) -> ApiError:
    """Return what a client is told about an error. What is not its fault goes to the log."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return _of_routing(error)
        case QueueFullError():
            after = {"Retry-After": str(math.ceil(error.retry_after))}
            return ApiError(429, _sentence(error), code="queue_full", headers=after)
        case DrainingError():
            after = {"Retry-After": str(RESTART_SECONDS)}
            return ApiError(503, _sentence(error), code="draining", headers=after)
        case DeadlineError():
            return ApiError(503, _sentence(error), code="deadline_exceeded")
        case RequestError() | RuntimeUnavailableError():
            return ApiError(400, _sentence(error))
    return _of_our_own(error)


def is_storage(error: Exception) -> bool:
    """Whether an error means that the model's files cannot be read as they should be."""
    return isinstance(error, _STORAGE)


def _of_routing(error: HTTPException) -> ApiError:
    """Return the error for a path or method that is not there."""
    messages = {
        404: "There is nothing at this path. GET /v1/models is a good start.",
        405: "This path does not take this method.",
    }
    message = messages.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers)


def _of_our_own(error: Exception) -> ApiError:
    """Log an error with all there is to know, and tell the client little: it may be anybody."""
    if isinstance(error, EdgeMemLLMError):
        _log.error("%s: %s: %s", REQUEST_ID.get(), type(error).__name__, error)
        what = "The model's files cannot be read" if is_storage(error) else "The model failed"
        return ApiError(500, f"{what}. The server's log says more.", code=type(error).__name__)
    _log.error("%s: the request failed", REQUEST_ID.get(), exc_info=error)
    return ApiError(500, "The server failed on this request. Its log says more.")


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


class BodyFields(Fields):
    """One JSON object; `path` is where it stands in the request, as `messages[0].`.

    Reading a value takes it. Every method raises `ApiError` naming the field.
    """

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        given = {name: value for name, value in values.items() if value is not None}
        super().__init__(given, partial(_refusal, path))
        self._path = path

    @classmethod
    def of(cls, value: object, where: str) -> BodyFields:
        """Take a value that has to be an object."""
        if not isinstance(value, dict):
            raise refused(where, f"{where} is {shown(value)}, expected an object.")
        return cls(value, f"{where}.")

    def param(self, name: str) -> str:
        """Return the name of a field as seen from the whole request."""
        return self._path + name

    def value(self, key: str) -> object:
        """Take a value of any type; None when it is not there."""
        return self._values.pop(key, None)

    def peek(self, name: str) -> object:
        """Look at a value of any type without taking it; None when it is not there."""
        return self._values.get(name)

    def required(self, name: str) -> object:
        """Take a value of any type that has to be there."""
        value = self.value(name)
        if value is None:
            where = self.param(name)
            raise refused(where, f"{where} is missing.", "missing_required_parameter")
        return value

    def bounded_text(self, name: str, most: int) -> str | None:
        """Take a text of at most `most` characters."""
        value = self.value(name)
        return None if value is None else checked_text(value, self.param(name), most)

    def group(self, name: str) -> BodyFields | None:
        """Take an object."""
        value = self.value(name)
        return None if value is None else BodyFields.of(value, self.param(name))

    def required_group(self, name: str) -> BodyFields:
        """Take an object that has to be there."""
        return BodyFields.of(self.required(name), self.param(name))

    def pairs(self, name: str, most: int) -> Mapping[str, object]:
        """Take an object of at most `most` entries whose names the caller checks."""
        value = self.value(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > most:
            self._refuse(name, value, f"an object of at most {most} entries")
        return value

    def finish(self, unsupported: Mapping[str, Parameter] = NOTHING) -> None:
        """Refuse what is left, but for what is `unsupported` and asks for nothing."""
        for name, value in self._values.items():
            where = self.param(name)
            if name not in unsupported:
                message = f"There is no parameter {shown(where)}. Leave it out."
                raise refused(where, message, "unknown_parameter")
            if not unsupported[name].asks_for_nothing(value):
                message = f"{where} is not supported by this server: {unsupported[name].meaning}."
                raise refused(where, f"{message} Leave it out.", "unsupported_parameter")

    def _integer(self, key: str, value: object, low: int, high: int) -> int:
        if isinstance(value, float) and value.is_integer():  # JSON does not tell 2.0 from 2
            value = int(value)
        return super()._integer(key, value, low, high)


def _refusal(path: str, key: str, value: object, expected: str) -> ApiError:
    where = path + key
    return refused(where, f"{where} is {shown(value)}, expected {expected}.")


def checked_text(value: object, where: str, most: int) -> str:
    """Return a value that is text of at most `most` characters, all of which can be written."""
    if not isinstance(value, str):
        raise refused(where, f"{where} is {shown(value)}, expected text.")
    if len(value) > most:
        raise refused(where, f"{where} has {len(value)} characters, expected at most {most}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        message = f"{where} has half of a surrogate pair, expected text that can be UTF-8."
        raise refused(where, message) from None
    return value


def shown(value: object) -> str:
    """Describe a JSON value in a few words of ASCII, whatever a client has sent."""
    return described(value, _quoted)


def _quoted(text: str) -> str:
    found = json.dumps(text)
    return found if len(found) <= _SHOWN else f"{found[: _SHOWN - 4]}...{found[-1]}"


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
