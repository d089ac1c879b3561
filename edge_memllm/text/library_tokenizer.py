"""A tokenizer.json in the hands of the `tokenizers` library, which takes every form there is.

It makes tables of its own: 4 to 14 bytes of memory for each of the file, and some seconds for a
vocabulary of 262,144 entries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property

from edge_memllm.text import TOKENIZER_FILE
from edge_memllm.text.token_bound import TokenBound
from edge_memllm.text.tokenizer_file import TokenizerConfig, library_errors, open_tokenizer

_BRIEF = 4096  # characters that are encoded in a few milliseconds


class LibraryTokenizer:
    """Encodes and decodes; several threads may share it."""

    reader = "tokenizers"

    def __init__(self, definition: bytes, config: TokenizerConfig | None = None) -> None:
        """Take the bytes of a `tokenizer.json`, and what else is said of its tokens.

        Raises `ArtifactError` for what is no tokenizer.
        """
        self._tokenizer = open_tokenizer(definition)
        if config is not None:
            config.apply(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(number for number, token in added.items() if token.special)

    @property
    def definition(self) -> str:
        """The text of a `tokenizer.json` that makes the same tokenizer."""
        text: str = self._tokenizer.to_str()
        return text

    @property
    def bound(self) -> TokenBound:
        """How few tokens a text can have."""
        return TokenBound.of(self.definition)

    @cached_property
    def decoders(self) -> tuple[str, ...]:
        """The names of what a decoder does, in its order."""
        decoder = self._tokenizer.decoder
        fields = {} if decoder is None else json.loads(decoder.__getstate__())
        return tuple(each["type"] for each in fields.get("decoders", [fields]) if each)

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text; `special` puts what belongs around it.

        However long the text is, other threads go on meanwhile.
        """
        with library_errors(f"{TOKENIZER_FILE}: fails to encode a text"):
            # The first is quicker to call, but holds the interpreter; the second does not, and
            # leaves out the offsets, which take half of the time. Both give the same ids.
            if len(text) <= _BRIEF:
                encoding = self._tokenizer.encode(text, add_special_tokens=special)
            else:
                (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids: without those that are special or none."""
        with library_errors(f"{TOKENIZER_FILE}: fails to decode tokens"):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def spelling(self, token: int) -> str | None:
        """Return how an entry is spelt; None for an id that is none."""
        found: str | None = self._tokenizer.id_to_token(token)
        return found

    def token(self, spelling: str) -> int | None:
        """Return the id of the entry that is spelt so; None where there is none."""
        found: int | None = self._tokenizer.token_to_id(spelling)
        return found
