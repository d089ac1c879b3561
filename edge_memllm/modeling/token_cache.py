"""Files made once: token files, and tokenizers kept by digest of all that they were made from.

The networks of a family train on the same tokens. A file appears in one rename, so that a killed
run leaves no half of one, and runs may share a folder at the same time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from edge_memllm.atomic import WholeFile, not_written
from edge_memllm.errors import RecipeError, StorageError

_DIGITS = 32  # of the digest, in a file's name
_BLOCK = 4 << 20


def made_once(path: Path, make: Callable[[WholeFile], Any]) -> Path:
    """The file ``path``, written by ``make`` where it is not there yet."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with WholeFile(path) as file:
                make(file)
                file.publish()
        except (OSError, StorageError) as error:
            raise _not_written(path, error) from error
    return path


def content_key(paths: Sequence[str], *settings: Any) -> str:
    """Hex digits that stand for the contents of the files, in order, and settings as JSON."""
    contents = [[Path(path).suffix, _digest(path)] for path in paths]
    text = json.dumps([*settings, contents])
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target``, if it is not there, the same file as ``source``, or a copy of it."""
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # another disk, or one that knows no links
            target.hardlink_to(source)
            return
        with source.open("rb") as file:
            made_once(target, lambda copy: copy_into(copy, file))
    except OSError as error:
        raise _not_written(target, error) from error


def copy_into(copy: WholeFile, file: BinaryIO) -> None:
    """Write all that is left of an open file."""
    while block := file.read(_BLOCK):
        copy.write(block)


def _not_written(path: Path, error: OSError | StorageError) -> RecipeError:
    if isinstance(error, OSError):
        error = not_written(path, error)
    return RecipeError(str(error))


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
