"""Every error a user of edge-memllm can meet, in one tree.

    EdgeMemLLMError
     +- ArtifactError             the folder cannot be used: missing, unsafe, malformed, too new
     |   +- CorruptionError       bytes differ from what the manifest promises
     +- StorageError              reading failed while running
     +- ExportError               an export was refused or failed
     +- RuntimeUnavailableError   a device or an optional package is not there
     +- RequestError              what was asked for cannot be done (also a ValueError)
     +- RecipeError               a training recipe or corpus is wrong (also a ValueError)
     +- GenerationCancelledError  a generation was cancelled by who asked for it
     +- ServiceError              an engine did not serve a request that could be served
         +- QueueFullError        too many requests wait already; come back later
         +- DeadlineError         the request's time was over
         +- DrainingError         the engine is ending and takes no more

A message says where, what was found, what was expected and what to do. This module imports
nothing, so that every other module can import it.
"""

from __future__ import annotations


class EdgeMemLLMError(Exception):
    """Base of every error raised on purpose; its text is one message meant for a person."""


class ArtifactError(EdgeMemLLMError):
    """The artifact cannot be used: missing, unsafe, malformed or made for another version."""


class CorruptionError(ArtifactError):
    """Bytes on storage differ from what the manifest promises (size, digest or checksum)."""


class StorageError(EdgeMemLLMError):
    """Reading failed while running: an I/O error, or a file truncated while it was open."""


class ExportError(EdgeMemLLMError):
    """An export was refused or failed; nothing usable was left behind."""


class RuntimeUnavailableError(EdgeMemLLMError):
    """A device or an optional package that was asked for is not there."""


class RequestError(EdgeMemLLMError, ValueError):
    """What was asked for cannot be done with this model."""


class RecipeError(EdgeMemLLMError, ValueError):
    """A training recipe or a training corpus is wrong."""


class GenerationCancelledError(EdgeMemLLMError):
    """A generation ended before its text did, because its `Cancellation` asked for that."""


class ServiceError(EdgeMemLLMError):
    """An engine did not serve a request, though nothing is wrong with the request."""


class QueueFullError(ServiceError):
    """Too many requests wait already; worth trying again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ServiceError):
    """The time that a request was given is over."""


class DrainingError(ServiceError):
    """The engine is ending: it takes no more requests, and gives up those it cannot finish."""


def missing_extra(package: str, extra: str) -> RuntimeUnavailableError:
    """Return the error for an optional `package` that the extra named `extra` would install."""
    return RuntimeUnavailableError(
        f"This needs the package '{package}', which is not installed. {how_to_install(extra)}"
    )


def how_to_install(extra: str = "") -> str:
    """Say how to install with an extra. No package index has us: from a clone, or from a wheel."""
    brackets = f"[{extra}]" if extra else ""
    return (
        f"Install it: pip install '.{brackets}' in a clone of edge-memllm, or with its wheel "
        f"pip install 'FILE.whl{brackets}'"
    )


class Cancellation:
    """A request that work under way should end. Thread-safe; once made, it stays.

    Give it to one or more generations. Each looks at it before every step it computes: it ends
    within one token, or within one chunk of the prompt, by raising `GenerationCancelledError`.
    """

    def __init__(self) -> None:
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Ask for the end; calling it again, or when nothing is under way, is fine."""
        self._cancelled = True

    def check(self) -> None:
        """Raise `GenerationCancelledError` if the end was asked for."""
        if self._cancelled:
            raise GenerationCancelledError(
                "The generation was cancelled: what it gave before is all there is."
            )
