"""Reading the text that a user names or pipes in, with errors that say what is wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_memllm.errors import RequestError


def read_text(path: Path) -> str:
    """Return the text of a file, which must be UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: byte {error.start} is not UTF-8 text. Convert the file to UTF-8."
        ) from error


def read_standard_input() -> str:
    """Return what is piped in, without the line break that a shell puts at its end."""
    try:
        text = sys.stdin.read().removesuffix("\n")
        text.encode()  # some locales let bytes through that are no text, as half surrogates
    except UnicodeError as error:
        raise RequestError("Standard input is not UTF-8 text. Convert it to UTF-8.") from error
    return text
