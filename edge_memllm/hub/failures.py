"""The library `huggingface_hub`, and its errors in our words.

They come from several trees, one of them that of its HTTP client, which differs by version.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edge_memllm.errors import (
    ArtifactError,
    EdgeMemLLMError,
    RequestError,
    StorageError,
    missing_extra,
)
from edge_memllm.hub.names import HubModel

_AGAIN = "What has arrived is kept: run it again to go on from there."


def import_hub() -> Any:
    """Return the module huggingface_hub; raises `RuntimeUnavailableError` without it."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise missing_extra("huggingface_hub", "hub") from error
    return huggingface_hub


@contextmanager
def explained(model: HubModel, wanted: str, hint: str = "") -> Iterator[None]:
    """Raise what the library raises as an error of ours, which names the model and `wanted`.

    `hint` says more when the model has no such file.
    """
    try:
        yield
    except EdgeMemLLMError:
        raise
    except (OSError, ValueError) as error:
        raise _explanation(model, wanted, hint, error) from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # a bug, not a failure of the network
            raise
        raise _unreachable(model, error) from error


def _explanation(model: HubModel, wanted: str, hint: str, error: Exception) -> EdgeMemLLMError:
    from huggingface_hub import errors

    match error:
        case errors.HFValidationError():
            return RequestError(f"{model}: {error}")
        case errors.GatedRepoError():
            return ArtifactError(
                f"{model}: access to this model must be granted on its page on the Hugging Face "
                "Hub. Ask for it there, then log in with: hf auth login"
            )
        case errors.RevisionNotFoundError():
            return ArtifactError(
                f"{model}: the model has no such revision. Give a branch, tag or commit it has."
            )
        case errors.RepositoryNotFoundError():
            return ArtifactError(
                f"{model}: no such folder is here and no such model on the Hugging Face Hub, "
                "or it is private. Check the name; for a private one log in with: hf auth login"
            )
        case errors.LocalEntryNotFoundError() | ConnectionError():
            return _unreachable(model, error)
        case errors.EntryNotFoundError():
            return ArtifactError(
                f"{model}: the model on the Hugging Face Hub has no {wanted}.{hint}"
            )
        case OSError(errno=errno.ENOSPC):
            return StorageError(f"{model}: the disk is full. Free some space. {_AGAIN}")
        case OSError() if error.filename:
            return StorageError(f"{error.filename}: {error.strerror}. Check the folder.")
        case _:
            return ArtifactError(f"{model}: {wanted} cannot be downloaded: {error}")


def _unreachable(model: HubModel, error: BaseException) -> ArtifactError:
    while error.__cause__ is not None:  # what the network said, not what followed from it
        error = error.__cause__
    reason = str(error).strip().rstrip(".")
    return ArtifactError(
        f"{model}: no such folder is here, and the Hugging Face Hub cannot be asked for what has "
        f"not been downloaded: {reason}. Check the connection, or copy the folder by hand. {_AGAIN}"
    )
