"""What a user may call a model: a folder of this machine, or a name on the Hugging Face Hub.

A folder always wins. Nothing is looked up here.

Errors of `huggingface_hub` come from several trees, one of them that of its HTTP client, which
differs by version: here they become ours.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Self

from edge_memllm.errors import (
    ArtifactError,
    EdgeMemLLMError,
    RequestError,
    StorageError,
    missing_extra,
)

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_PLAIN = re.compile(rf"{_NAME}/{_NAME}")
_SCHEME = "hf:/"  # a path object has made one slash of two
_MARKED = re.compile(rf"hf:/{{1,2}}({_NAME}/{_NAME})(?:@([A-Za-z0-9._/-]{{1,200}}))?")

_AGAIN = "What has arrived is kept: run it again to go on from there."


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the Hub: `org/name`, and a branch, tag or commit, None for the default branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @classmethod
    def parse(cls, source: str | os.PathLike[str]) -> Self | None:
        """Return the model that `source` names, or None for a path of this machine.

        `hf://org/name`, with `@revision` or without, is always of the Hub. `org/name` is, unless
        something of that name is here. Raises `RequestError` for a misspelt `hf://` name, and
        `ArtifactError` for `org/name` when there is a folder `org` without `name`: then either
        could be meant.
        """
        text = source.as_posix() if isinstance(source, PurePath) else os.fspath(source)
        if text.startswith(_SCHEME):
            return cls._marked(text)
        if os.path.lexists(text) or not _PLAIN.fullmatch(text):
            return None
        parent = text.partition("/")[0]
        if os.path.lexists(parent):
            raise ArtifactError(
                f"{text}: does not exist, expected the folder of a model in '{parent}'. If the "
                f"model of that name on the Hugging Face Hub is meant, write hf://{text}."
            )
        return cls(text)

    @classmethod
    def wanted(cls, source: str | os.PathLike[str], revision: str | None) -> Self | None:
        """Return what `parse` returns, at `revision` unless that is None.

        Raises `RequestError` for the revision of a folder, which has none, and as `parse` does.
        """
        model = cls.parse(source)
        if revision is None:
            return model
        if model is None:
            raise RequestError(
                f"{os.fspath(source)}: this is a folder, and revision {revision!r} is for models "
                "of the Hugging Face Hub. Leave it out."
            )
        return cls(model.repository, revision)

    @classmethod
    def _marked(cls, text: str) -> Self:
        found = _MARKED.fullmatch(text)
        if found is None:
            name = text.removeprefix(_SCHEME).lstrip("/")
            raise RequestError(
                f"hf://{name:.200}: not the name of a model on the Hugging Face Hub, expected "
                "hf://org/name or hf://org/name@revision."
            )
        return cls(found[1], found[2])


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


def lacks_the_file(error: ArtifactError) -> bool:
    """Whether `explained` made it of a model that is there without the file that was wanted."""
    from huggingface_hub import errors

    cause = error.__cause__
    here = isinstance(cause, errors.LocalEntryNotFoundError)  # it may be there, nobody was asked
    return isinstance(cause, errors.EntryNotFoundError) and not here


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
