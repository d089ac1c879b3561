"""Texts of any length as token ids: in parts, so that little memory is needed, as if in one.

Knows a tokenizer; nothing of models.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from itertools import islice

from edge_memllm.engine.request import check_tokens
from edge_memllm.text.tokenization import Tokenizer

BLOCK = 1 << 18  # characters; a tokenizer takes up to some 200 bytes for each
_AROUND = 128  # characters on each side of a cut that are tokenized with and without it
_TRIES = 16
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def long_text_tokens(tokenizer: Tokenizer, text: str, vocab_size: int) -> array[int]:
    """Return the ids of a text, without special tokens around it, at 4 bytes each.

    They are those of the text as a whole. Raises `RequestError` for an id that is not in the
    vocabulary.
    """
    ids = array("i")
    for block in _blocks(tokenizer, text):
        ids.extend(check_tokens(tokenizer.encode(block, special=False), vocab_size))
    return ids


def tokens_beyond(tokenizer: Tokenizer, text: str, most: int) -> int | None:
    """Return a number of tokens, above `most`, that a text has at least; None if it has fewer.

    Looks no further into the text than it has to. Special tokens around it are not counted.
    """
    count = 0
    for block in _blocks(tokenizer, text):
        count += len(tokenizer.encode(block, special=False))
        if count > most:
            return count
    return None


def _blocks(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    begin = 0
    while begin < len(text):
        end = _cut(tokenizer, text, begin + BLOCK)
        yield text[begin:end]
        begin = end


def _cut(tokenizer: Tokenizer, text: str, earliest: int) -> int:
    """Return the first place from `earliest` on where a cut changes nothing, or the end."""
    places = (found.start() for found in _WORD_END.finditer(text, earliest))
    for place in islice(places, _TRIES):
        before, after = text[place - _AROUND : place], text[place : place + _AROUND]
        parts = [tokenizer.encode(part, special=False) for part in (before, after)]
        if tokenizer.encode(before + after, special=False) == parts[0] + parts[1]:
            return place
    return len(text)
