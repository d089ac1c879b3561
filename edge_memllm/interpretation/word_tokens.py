"""Words as the tokens that they begin with, with and without a space before them.

Knows a tokenizer and texts of tokens; nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.interpretation.finding import Finding
from edge_memllm.interpretation.findings import Token
from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.tokenization import Tokenizer


@dataclass(frozen=True, slots=True)
class WordToken(Finding):
    """A token that one spelling of a word begins with.

    `whole`: the token is all of the spelling; else other words may begin with it as well.
    """

    token: Token
    spelling: str
    whole: bool


@dataclass(frozen=True, slots=True)
class WordTokens(Finding):
    """What some words begin with: the tokens that stand for them, and those left out.

    Left out are first pieces of spellings that are several tokens, unless they were asked for.
    """

    taken: tuple[WordToken, ...]
    left_out: tuple[WordToken, ...]

    @property
    def ids(self) -> NDArray[np.int64]:
        """The ids of the tokens taken, rising."""
        return np.array(sorted(each.token.id for each in self.taken), np.int64)


def word_tokens(
    tokenizer: Tokenizer, texts: TokenTexts, words: Sequence[str], *, pieces: bool = False
) -> WordTokens:
    """Return the tokens that words begin with, each once.

    A word is looked up with a space before it and without one; a word that is given with a space,
    only so; `#12` is token 12. `pieces` also takes the first token of spellings that are several.
    Raises `RequestError` for a word of which nothing is taken.
    """
    if not words:
        raise RequestError("There is no word. Name at least one.")
    taken: dict[int, WordToken] = {}
    left_out: dict[int, WordToken] = {}
    for word in words:
        found = _spelled(tokenizer, texts, word)
        kept = [each for each in found if each.whole or pieces]
        if not kept:
            raise _no_whole_token(word, found)
        # A token that is whole in one spelling stays whole, in whatever order words come.
        for each in sorted(kept, key=lambda one: not one.whole):
            if each.whole or each.token.id not in taken:
                taken[each.token.id] = each
        left_out |= {each.token.id: each for each in found if each not in kept}
    for token in taken:
        left_out.pop(token, None)
    return WordTokens(tuple(taken.values()), tuple(left_out.values()))


def _spelled(tokenizer: Tokenizer, texts: TokenTexts, word: str) -> list[WordToken]:
    """The first token of each spelling of a word."""
    if not word.strip():
        raise RequestError(f"{word!a} is no word. Name a word, or a token's number as #12.")
    if word.startswith("#") and word[1:].isdecimal():
        token = texts.token(texts.find(word))
        return [WordToken(token, token.text, True)]
    found = []
    for spelling in (word,) if word.startswith(" ") else (f" {word}", word):
        ids = tokenizer.encode(spelling, special=False)
        if ids:
            found.append(WordToken(texts.token(ids[0]), spelling, len(ids) == 1))
    return found


def _no_whole_token(word: str, found: Sequence[WordToken]) -> RequestError:
    starts = " and ".join(f"{each.token.text!a} (#{each.token.id})" for each in found)
    begins = f": its spellings begin with {starts}, as other words may" if found else ""
    return RequestError(
        f"{word!a} is not one token of this vocabulary{begins}. Take first pieces as well "
        "(--pieces, pieces=True), or name other words."
    )
