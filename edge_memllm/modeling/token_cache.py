"""Files made once: token files, and tokenizers kept by digest of all that they were made from.

The networks of a family train on the same tokens. A file appears in one rename, so that a killed
run leaves no half of one, and runs may share a folder at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_memllm.errors import RecipeError

_DIGITS = 32  # of the digest, in a file's name


def made_once(path: Path, make: Callable[[Path], Any]) -> Path:
    """The file ``path``, made by ``make(some other path)`` where it is not there yet."""
    if not path.exists():
        partial = path.with_name(f"{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            make(partial)
            partial.replace(path)
        except OSError as error:
            raise RecipeError(f"{path}: cannot be written ({error.strerror}).") from error
    return path


def content_key(paths: Sequence[str], *settings: Any) -> str:
    """Hex digits that stand for the contents of the files, in order, and settings as JSON."""
    contents = [[Path(path).suffix, _digest(path)] for path in paths]
    text = json.dumps([*settings, contents])
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, or a copy where links cannot be made."""
    try:
        target.hardlink_to(source)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(source, target)


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
