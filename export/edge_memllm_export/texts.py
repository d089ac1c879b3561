"""The text that comes along, and tokens of texts. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import ExportError, RequestError
from edge_memllm.long_text import long_text_tokens
from edge_memllm.tokenization import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


def default_text() -> str:
    """About 20 kB of public-domain English prose that ships with the package."""
    return resources.files("edge_memllm_export").joinpath("quality_text.txt").read_text("utf-8")


@dataclass(frozen=True)
class TableText:
    """A text that a table is stored for: what to call it, and its tokens."""

    name: str
    tokens: NDArray[np.int64]


def table_text(tokenizer: bytes | None, text: str | None, vocab_size: int, where: str) -> TableText:
    """The text, None the shipped one, by the model's own tokenizer: what tokenizer.json holds.

    Raises ExportError when there is none, or one of another model.
    """
    if tokenizer is None:
        raise ExportError(
            f"{where}: no tokenizer.json, so the tokens of the table text cannot be "
            "counted. Put the tokenizer there, or leave the text out."
        )
    try:
        found = long_text_tokens(
            Tokenizer(tokenizer), default_text() if text is None else text, vocab_size
        )
    except RequestError as error:
        raise ExportError(
            f"{where}: tokenizer.json is another model's: {error} Put the right one there."
        ) from error
    name = "the prose that comes along" if text is None else "the table text"
    return TableText(name, np.asarray(found, np.int64))
