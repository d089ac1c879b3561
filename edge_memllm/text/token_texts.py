"""Tokens as people read them, one by one. Knows a tokenizer; nothing of models."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.text.long_text import long_text_tokens
from edge_memllm.text.tokenization import Tokenizer

_UNFINISHED = "\ufffd"  # what bytes decode to that are no character
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how some vocabularies spell a byte
_WORD_START = "\u2581"  # how some vocabularies spell a leading space


class TokenTexts:
    """The texts of the `vocabulary` tokens of a model, some of which its tokenizer may lack."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._bytes = {letter: byte for byte, letter in _byte_alphabet().items()}

    def __len__(self) -> int:
        return self._vocabulary

    def text(self, token: int) -> str:
        """Return a token's text; what has none shows its spelling, or its bytes: `<E2 80>`."""
        spelling = self._tokenizer.spelling(token)
        if spelling is None:
            return f"<{token}>"
        text = self._tokenizer.decode([token])
        if not text or _UNFINISHED in text:
            return self._shown_bytes(spelling)
        lost_space = spelling.startswith(_WORD_START) and not text.startswith(" ")
        return f" {text}" if lost_space else text

    def has_text(self, token: int) -> bool:
        """Whether a token has text of its own: not a special one, not a part of a character."""
        text = self._tokenizer.decode([token])
        return bool(text) and _UNFINISHED not in text

    def utf8(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; those of its spelling if it adds none."""
        spelling = self._tokenizer.spelling(token) or ""
        text = self._tokenizer.decode([token])
        if text and _UNFINISHED not in text:
            return self.text(token).encode()
        if fallback := _BYTE.fullmatch(spelling):
            return bytes.fromhex(fallback[1])
        values = [self._bytes.get(letter) for letter in spelling]
        return bytes(value for value in values if value is not None)

    def counts(self, text: str) -> NDArray[np.int64]:
        """Return how often each token [V] is in a text."""
        ids = long_text_tokens(self._tokenizer, text, self._vocabulary)
        return np.bincount(np.asarray(ids, np.int64), minlength=self._vocabulary)

    def find(self, word: str) -> int:
        """Return the token that a word is, as it stands inside a line: with a space before it.

        The token without one is taken where there is no other, or where the word is given with
        its spaces; `#12` is token 12. Raises `RequestError` for a word of several tokens.
        """
        if word.startswith("#") and word[1:].isdecimal():
            return self._known(int(word[1:]))
        spelled = [word] if word.startswith(" ") else [f" {word}", word]
        tried = [self._tokenizer.encode(each, special=False) for each in spelled if word]
        for ids in tried:
            if len(ids) == 1:
                return self._known(ids[0])
        parts = ", ".join(f"{self.text(each)!r} (#{each})" for ids in tried[-1:] for each in ids)
        raise RequestError(
            f"{word!r} is {f'several tokens: {parts}' if parts else 'no token'}. Name one token: "
            "a word or part of one, or its number as #12."
        )

    def _known(self, token: int) -> int:
        if token >= self._vocabulary:
            raise RequestError(
                f"token #{token} is not in the vocabulary, which has #0 to #{self._vocabulary - 1}."
            )
        return token

    def _shown_bytes(self, spelling: str) -> str:
        values = [self._bytes.get(letter) for letter in spelling]
        if None in values or all(0x20 < value < 0x7F for value in values if value is not None):
            return spelling  # a special token, or one of another kind of vocabulary
        return f"<{' '.join(f'{value:02X}' for value in values)}>"


def _byte_alphabet() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's `encoder.py`)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(0x100 + number) for number, byte in enumerate(others)
    }
