"""Texts of tokens, and tokens of words."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers

from edge_memllm import RequestError
from edge_memllm.interpretation.tokens import token_of
from edge_memllm.text.token_texts import TokenTexts
from edge_memllm.text.tokenization import Tokenizer
from support.checkpoints import BOS, VOCABULARY
from support.small_model import byte_tokenizer

BYTES = TokenTexts(byte_tokenizer(), VOCABULARY)


def letter(character: str) -> int:
    (token,) = byte_tokenizer().encode(character)
    return token


def words(**vocabulary: int) -> TokenTexts:
    """A vocabulary of whole words, in which a leading space is spelled as some have it."""
    made = LibraryTokenizer(models.WordLevel(vocabulary | {"?": len(vocabulary)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return TokenTexts(Tokenizer(made.to_str().encode()), len(vocabulary) + 1)


def test_a_token_shows_its_text() -> None:
    assert token_of(BYTES, letter("a")) == token_of(BYTES, letter("a"))
    assert BYTES.text(letter("a")) == "a"
    assert BYTES.text(letter(" ")) == " "
    assert BYTES.text(letter("\n")) == "\n"
    assert len(BYTES) == VOCABULARY


def test_a_token_without_text_shows_its_spelling_or_its_bytes() -> None:
    first, second = byte_tokenizer().encode("é")
    assert (BYTES.text(first), BYTES.text(second)) == ("<C3>", "<A9>")
    assert BYTES.text(BOS) == "<s>"
    assert BYTES.text(VOCABULARY - 1) == f"<{VOCABULARY - 1}>"


def test_a_leading_space_is_never_lost() -> None:
    texts = words(**{"▁sea": 0, "sea": 1})
    assert [texts.text(token) for token in (0, 1)] == [" sea", "sea"]


def test_a_word_is_its_token_behind_a_space() -> None:
    texts = words(**{"▁sea": 0, "sea": 1, "land": 2})
    assert texts.find("sea") == texts.find(" sea") == 0
    assert texts.find("#1") == 1
    assert BYTES.find("a") == letter("a")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sea", r"'sea' is several tokens: 's' \(#\d+\), 'e' \(#\d+\), 'a' \(#\d+\)\. Name"),
        ("", "'' is no token. Name one"),
        ("#300", "token #300 is not in the vocabulary, which has #0 to #299"),
    ],
)
def test_what_is_not_one_token_is_refused(word: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BYTES.find(word)


def test_tokens_of_a_text_are_counted() -> None:
    counts = BYTES.counts("abba")
    assert (counts[letter("a")], counts[letter("b")], counts.sum()) == (2, 2, 4)
    assert counts.dtype == np.int64
