"""Biases of tokens as a request gives them: by number, or in llama.cpp's forms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from edge_memllm.checked_values import is_integer, is_number
from edge_memllm.sampling import FORBIDDEN, MOST_BIAS
from edge_memllm.server.fields import ApiError, BodyFields, checked_text, refused, shown
from edge_memllm.text.tokenization import Tokenizer

_MOST_TEXT = 256


def take_biases(
    fields: BodyFields, vocab_size: int, most: int, words: Tokenizer | None = None
) -> dict[int, float]:
    """Take `logit_bias`: at most `most` tokens of a vocabulary, each with what is added.

    OpenAI has an object by number. llama.cpp has lists of two as well, `[token, bias]`, where false
    forbids; with `words` a text stands for each of its tokens. Raises `ApiError`.
    """
    value, where = fields.peek("logit_bias"), fields.param("logit_bias")
    if isinstance(value, list):
        fields.value("logit_bias")
        pairs: Iterable[tuple[object, object]] = _pairs(value, where)
    else:
        pairs = ((_number(name), each) for name, each in fields.pairs("logit_bias", most).items())
    found: dict[int, float] = {}
    for key, bias in pairs:
        for token in _tokens(key, where, vocab_size, words):
            found[token] = _bias(bias, f"{where}.{_name(key)}")
        if len(found) > most:
            raise refused(where, f"{where} has more than {most} tokens, expected at most {most}.")
    return found


def _pairs(value: list[object], where: str) -> Iterator[tuple[object, object]]:
    for number, each in enumerate(value):
        if not isinstance(each, list) or len(each) != 2:
            place = f"{where}[{number}]"
            raise refused(place, f"{place} is {shown(each)}, expected a token and its bias.")
        yield each[0], each[1]


def _number(name: str) -> object:
    """Return the number that a name is, or the name."""
    plain = name.isascii() and name.isdecimal() and len(name) < 20
    return int(name) if plain and str(int(name)) == name else name


def _tokens(key: object, where: str, vocab_size: int, words: Tokenizer | None) -> list[int]:
    if isinstance(key, str) and words is not None:
        text = checked_text(key, where, _MOST_TEXT)
        return words.encode(text, special=False)
    if is_integer(key) and 0 <= key < vocab_size:
        return [key]
    raise _unknown(key, where, vocab_size)


def _unknown(key: object, where: str, vocab_size: int) -> ApiError:
    expected = f"token numbers from 0 to {vocab_size - 1}"
    name = str(key) if is_integer(key) else key
    return refused(where, f"{where} has the entry {shown(name)}, expected {expected}.")


def _bias(value: object, where: str) -> float:
    if value is False:
        return FORBIDDEN
    if value is None:
        return 0.0
    if not is_number(value) or not math.isfinite(value) or abs(value) > MOST_BIAS:
        expected = f"a number from {-MOST_BIAS:g} to {MOST_BIAS:g}"
        raise refused(where, f"{where} is {shown(value)}, expected {expected}.")
    return float(value)


def _name(key: object) -> str:
    return str(key) if is_integer(key) else shown(key)
