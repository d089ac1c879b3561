"""Errors as OpenAI's protocol words them: a status, and one object that says what is wrong.

The only place that knows which error of the library is which status.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from edge_memllm.errors import (
    CorruptionError,
    DeadlineError,
    DrainingError,
    EdgeMemLLMError,
    QueueFullError,
    RequestError,
    RuntimeUnavailableError,
    StorageError,
)

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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the object that stands for the error, in a response or in a stream."""
        return {
            "error": {
                "message": str(self),
                "type": _KINDS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
                "request_id": REQUEST_ID.get() or None,
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
