"""Tokens as people read them, and words as tokens. Knows a tokenizer, nothing of models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Ids
from edge_memllm.errors import RequestError
from edge_memllm.interpretation.findings import Finding, Token
from edge_memllm.sweep.measuring import CLASS_STARTS, class_name
from edge_memllm.text.token_texts import TokenTexts
from edge_memllm.text.tokenization import Tokenizer

UNLABELLED = -1
_FEWEST = 40  # labelled tokens, without which a labelling says nothing

_FUNCTION_WORDS = {
    "determiner": "a an the this these those each every either neither another such both all "
    "some any no my your his her its our their which what whose much many few several most",
    "pronoun": "i me he him she it we us they them you who whom himself herself itself myself "
    "yourself themselves ourselves something anything nothing everything someone anyone "
    "everyone nobody somebody everybody mine yours hers ours theirs one",
    "preposition": "of in to for with on at by from about into through over under between after "
    "before against during without within among upon towards toward across behind beyond near "
    "around along beneath beside above below except per until till via amid onto off despite",
    "conjunction": "and or but nor yet so if because although though while whereas unless since "
    "whether than as that when where",
    "auxiliary": "is are was were be been being am has have had having do does did doing will "
    "would shall should can could may might must ought cannot",
    "number word": "two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
    "ninety hundred thousand million billion",
}
_CLASS_OF = {word: name for name, words in _FUNCTION_WORDS.items() for word in words.split()}
# A vowel before the ending, so that "bring" is not meant.
_ENDINGS = (
    ("-ing form", re.compile(r"[a-z]*[aeiouy][a-z]*ing")),
    ("-ed form", re.compile(r"[a-z]*[aeiouy][a-z]*[a-df-z]ed")),
    ("-ly adverb", re.compile(r"[a-z]{4,}ly")),
    ("noun ending", re.compile(r"[a-z]{2,}(?:tion|sion|ness|ment|ity|ship|hood|ism|ance|ence)s?")),
    ("adjective ending", re.compile(r"[a-z]{3,}(?:ous|ful|less|able|ible|ive|ical|ish|ary)")),
)


def token_of(texts: TokenTexts, token: int) -> Token:
    """Return a token with its text."""
    return Token(token, texts.text(token))


@dataclass(frozen=True, slots=True)
class Labelling:
    """A class for each token [V], an index into `names`, or `UNLABELLED`."""

    name: str
    names: tuple[str, ...]
    classes: Ids

    @property
    def labelled(self) -> Ids:
        """The tokens that have a class."""
        return np.flatnonzero(self.classes != UNLABELLED)


def labellings(texts: TokenTexts, counts: Ids | None = None) -> tuple[Labelling, ...]:
    """Return the labellings of a vocabulary; `counts` [V] says how often a text has each token.

    One that labels too few tokens, or gives all the same class, is left out.
    """
    words = [texts.text(token) for token in range(len(texts))]
    plain = [texts.has_text(token) for token in range(len(texts))]
    found = [
        _labelling("characters", map(character_class, words, plain)),
        _labelling("word class", map(word_class, words)),
    ]
    if counts is not None:
        found.insert(1, _labelling("frequency", [frequency_band(count) for count in counts]))
    return tuple(each for each in found if len(each.names) > 1 and len(each.labelled) >= _FEWEST)


def character_class(text: str, plain: bool = True) -> str:
    """Return what a token is made of; `plain` is False for one without text of its own.

    A token with a leading space is the beginning of a word, or all of it.
    """
    if not plain:
        return "part of a character or special"
    letters = text.strip()
    if not letters:
        return "white space"
    if letters.isdecimal():
        return "digits"
    if not any(letter.isalnum() for letter in letters):
        return "punctuation"
    if not letters.isalpha():
        return "mixed"
    place = "word" if text[0].isspace() else "inner part"
    return f"{_case(letters)} {place}"


def frequency_band(count: int) -> str:
    """Return the band of a number of occurrences; the bands are those of the sweep's report."""
    band = int(np.searchsorted(CLASS_STARTS, count, side="right"))
    most = CLASS_STARTS[band] - 1 if band < len(CLASS_STARTS) else None
    return f"seen {class_name({'least': CLASS_STARTS[band - 1], 'most': most})} times"


def word_class(text: str) -> str | None:
    """Return the class of a whole lower-case English word, None where the rule has none."""
    word = text[1:]
    if not text.startswith(" ") or not re.fullmatch("[a-z]+", word):
        return None
    if word in _CLASS_OF:
        return _CLASS_OF[word]
    return next((name for name, ending in _ENDINGS if ending.fullmatch(word)), None)


def _case(letters: str) -> str:
    if letters.islower():
        return "lower-case"
    if letters.isupper() and len(letters) > 1:
        return "upper-case"
    return "capitalised" if letters[0].isupper() else "other letters,"


def _labelling(name: str, classes: Iterable[str | None]) -> Labelling:
    listed = list(classes)
    names = sorted({each for each in listed if each is not None})
    numbers = {each: number for number, each in enumerate(names)}
    found = [UNLABELLED if each is None else numbers[each] for each in listed]
    return Labelling(name, tuple(names), np.array(found, np.int64))


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
        token = token_of(texts, texts.find(word))
        return [WordToken(token, token.text, True)]
    found = []
    for spelling in (word,) if word.startswith(" ") else (f" {word}", word):
        ids = tokenizer.encode(spelling, special=False)
        if ids:
            found.append(WordToken(token_of(texts, ids[0]), spelling, len(ids) == 1))
    return found


def _no_whole_token(word: str, found: Sequence[WordToken]) -> RequestError:
    starts = " and ".join(f"{each.token.text!a} (#{each.token.id})" for each in found)
    begins = f": its spellings begin with {starts}, as other words may" if found else ""
    return RequestError(
        f"{word!a} is not one token of this vocabulary{begins}. Take first pieces as well "
        "(--pieces, pieces=True), or name other words."
    )
