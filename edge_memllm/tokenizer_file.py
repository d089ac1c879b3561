"""The one place that opens a tokenizer.json and that the `tokenizers` library is called through.

Such a file may say that texts are cut, padded or split at random; that serves training with other
tools, and here would change a prompt without a word. So a tokenizer always comes without. The
library fails with bare exceptions and, where its own code panics, with a BaseException; here both
become `ArtifactError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers

from edge_memllm.errors import ArtifactError
from edge_memllm.strict_json import parse_json_object
from edge_memllm.tokenizer_check import check_tokenizer

TOKENIZER_FILE = "tokenizer.json"
# The largest known vocabularies, of 262,144 tokens, take 35 million bytes.
MAX_TOKENIZER_BYTES = 64 << 20


def open_tokenizer(definition: bytes, where: str = TOKENIZER_FILE) -> tokenizers.Tokenizer:
    """Return the tokenizer of the bytes of a tokenizer.json, as it encodes whole texts for sure.

    Raises `ArtifactError`, which names `where`.
    """
    check_tokenizer(parse_json_object(definition, where, MAX_TOKENIZER_BYTES), where)
    with library_errors(f"{where}: not a tokenizer that tokenizers {tokenizers.__version__} reads"):
        tokenizer = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
    return tokenizer


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Raise `ArtifactError`, which begins with `what`, where the library fails."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise ArtifactError(
            f"{what} ({error}). Copy the file again, or export again from the model's own."
        ) from error


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up; the class cannot be imported."""
    return type(error).__module__ == "pyo3_runtime"
