"""Labellings of tokens, and the words that clusters get from them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from edge_memllm.interpretation.cluster_labels import Labeller
from edge_memllm.interpretation.findings import Token
from edge_memllm.interpretation.tokens import (
    UNLABELLED,
    Labelling,
    character_class,
    frequency_band,
    labellings,
    token_of,
    word_class,
)
from edge_memllm.text.token_texts import TokenTexts
from support.checkpoints import VOCABULARY
from support.small_model import byte_tokenizer

TEXTS = TokenTexts(byte_tokenizer(), VOCABULARY)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" the", "lower-case word"),
        ("ing", "lower-case inner part"),
        (" London", "capitalised word"),
        (" A", "capitalised word"),
        ("NATO", "upper-case inner part"),
        (" 1984", "digits"),
        ("½", "mixed"),
        ("--", "punctuation"),
        (" €", "punctuation"),
        ("\n\n", "white space"),
        ("x2", "mixed"),
        ("\u6771\u4eac", "other letters, inner part"),
        ("\u0434\u0430", "lower-case inner part"),
    ],
)
def test_characters(text: str, found: str) -> None:
    assert character_class(text) == found


def test_a_token_without_text_is_named_so() -> None:
    assert character_class("<|endoftext|>", plain=False) == "part of a character or special"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" the", "determiner"),
        (" him", "pronoun"),
        (" between", "preposition"),
        (" because", "conjunction"),
        (" would", "auxiliary"),
        (" seven", "number word"),
        (" going", "-ing form"),
        (" walked", "-ed form"),
        (" quickly", "-ly adverb"),
        (" stations", "noun ending"),
        (" famous", "adjective ending"),
        *((f" {word}", None) for word in ("bring", "king", "need", "bed", "only", "table")),
        ("the", None),  # part of a longer word, perhaps
        (" The", None),
        (" don't", None),
        ("", None),
    ],
)
def test_word_classes(text: str, found: str | None) -> None:
    assert word_class(text) == found


def test_frequency_bands_are_those_of_the_sweep() -> None:
    bands = [frequency_band(count) for count in (0, 1, 2, 9, 10, 999, 1000, 10**6)]
    assert bands == [
        "seen 0 times",
        "seen 1 times",
        "seen 2 to 9 times",
        "seen 2 to 9 times",
        "seen 10 to 99 times",
        "seen 100 to 999 times",
        "seen 1,000 or more times",
        "seen 1,000 or more times",
    ]


def test_a_vocabulary_is_labelled() -> None:
    counts = np.zeros(VOCABULARY, np.int64)
    counts[TEXTS.find("e")] = 5
    (characters, frequency) = labellings(TEXTS, counts)
    assert (characters.name, frequency.name) == ("characters", "frequency")
    assert characters.names[characters.classes[TEXTS.find("7")]] == "digits"
    assert frequency.names[frequency.classes[TEXTS.find("e")]] == "seen 2 to 9 times"
    assert len(characters.labelled) == VOCABULARY
    # Single bytes are no words, and a text that is not there counts nothing.
    assert [each.name for each in labellings(TEXTS)] == ["characters"]
    assert [each.name for each in labellings(TEXTS, counts * 0)] == ["characters"]


def test_only_what_has_a_class_is_labelled() -> None:
    labelling = Labelling("x", ("a",), np.array([UNLABELLED, 0, 0]))
    assert labelling.labelled.tolist() == [1, 2]


def test_a_cluster_is_named_by_what_sets_it_apart() -> None:
    labeller = Labeller(TEXTS, labellings(TEXTS))
    digits = np.zeros(VOCABULARY, np.bool_)
    digits[[TEXTS.find(each) for each in "0123456789"]] = True
    assert labeller.label(digits, ()).startswith("digits 100%")
    letters = digits.copy()
    letters[[TEXTS.find(each) for each in "abcdefghij"]] = True
    named = labeller.label(letters, ())
    assert "digits 50%" in named
    assert "lower-case inner part 50%" in named


def test_what_says_little_comes_behind_typical_tokens() -> None:
    labeller = Labeller(TEXTS, labellings(TEXTS))
    some = np.array([character_class(TEXTS.text(i)) == "punctuation" for i in range(VOCABULARY)])
    some[80:180] = True
    named = labeller.label(some, [token_of(TEXTS, TEXTS.find(each)) for each in "ab"])
    assert re.fullmatch(r"like a, b; .* \d+%", named)


def test_a_cluster_like_all_is_named_by_its_tokens() -> None:
    labeller = Labeller(TEXTS, labellings(TEXTS))
    everything = np.ones(VOCABULARY, np.bool_)
    typical = [Token(0, " one"), Token(1, "\x1b\u202e"), Token(2, "\n"), Token(3, "four")]
    assert labeller.label(everything, typical) == "like one, \\x1b\\u202e, \\n"


class Written(TokenTexts):
    """A vocabulary of the texts that are given."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__(byte_tokenizer(), len(texts))
        self._texts = texts

    def text(self, token: int) -> str:
        return self._texts[token]


def test_endings_and_scripts_are_properties() -> None:
    english = [" walking", " talking", " making", " stone", " cloud", " marble", "Zebra"]
    texts = Written([*english, "\u043c\u043e", "\u0441\u043a", "\u0432\u0430"])
    labeller = Labeller(texts, ())

    def named(*tokens: int) -> str:
        members = np.zeros(len(texts), np.bool_)
        members[list(tokens)] = True
        return labeller.label(members, ())

    assert named(0, 1, 2).startswith("ends in -king 100%")  # the longest that says it all
    assert named(7, 8, 9).startswith("Cyrillic script 100%")
