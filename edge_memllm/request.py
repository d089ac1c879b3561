"""What may be asked of a model: prompts and limits, checked before any work is done.

Knows the model's shape from the manifest and the tokenizer; nothing of runtimes or tables.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from edge_memllm.checked_values import check_integer
from edge_memllm.errors import RequestError
from edge_memllm.manifest import ModelSpec
from edge_memllm.tokenization import Tokenizer

Prompt: TypeAlias = str | Sequence[int]

MOST_DRAFTS = 64


def check_tokens(ids: Iterable[object], vocab_size: int) -> list[int]:
    """Return the ids as plain integers; raises `RequestError` for what is not in the vocabulary.

    A bool or a float is not a token id, whatever its value.
    """
    return [_check_token(position, token, vocab_size) for position, token in enumerate(ids)]


def _check_token(position: int, token: object, vocab_size: int) -> int:
    try:
        number = -1 if isinstance(token, bool) else operator.index(token)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < vocab_size:
        found = repr(token) if number.bit_length() < 64 else "a huge integer"
        raise RequestError(
            f"token {position} is {found:.80}, expected an integer from 0 to {vocab_size - 1}."
        )
    return number


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer, model: ModelSpec) -> list[int]:
    """Return the ids of a prompt that fits the context; text is tokenized, ids are checked.

    An empty prompt becomes the token that starts a text, or else the one that ends it.
    Raises `RequestError`.
    """
    ids = text_tokens(prompt, tokenizer, model)
    if len(ids) > model.max_position_embeddings:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and the model's context holds "
            f"{model.max_position_embeddings}. Shorten the prompt."
        )
    if ids:
        return ids
    start = start_token(model)
    if start is None:
        raise RequestError(
            "the prompt is empty and the model has no token that starts a text. Give a prompt."
        )
    return [start]


def text_tokens(
    text: Prompt, tokenizer: Tokenizer, model: ModelSpec, *, special: bool = True
) -> list[int]:
    """Return the ids of text, or checked ids, however many; `special` as in `Tokenizer.encode`.

    Raises `RequestError`.
    """
    if isinstance(text, bytes) or not isinstance(text, Iterable):
        raise RequestError(f"the prompt is a {type(text).__name__}, expected text or token ids.")
    tokens = tokenizer.encode(text, special=special) if isinstance(text, str) else text
    return check_tokens(tokens, model.vocab_size)


def ending_tokens(
    stops: Iterable[str],
    stop_token_ids: Iterable[object],
    tokenizer: Tokenizer,
    model: ModelSpec,
    *,
    ignore_eos: bool,
) -> frozenset[int]:
    """Return the tokens that end a text: the model's own, unless ignored, and those asked for.

    A stop string that is one special token is that token: it never stands in the text. Raises
    `RequestError` for ids that are not in the vocabulary.
    """
    try:
        asked = check_tokens(stop_token_ids, model.vocab_size)
    except RequestError as error:
        raise RequestError(f"stop_token_ids: {error}") from None
    special = (tokenizer.special_token(text) for text in stops)
    found = {token for token in special if token is not None and token < model.vocab_size}
    return frozenset((*asked, *found, *(() if ignore_eos else model.eos_token_ids)))


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many elements two sequences have in common from the front."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(place for place in range(shorter) if first[place] != second[place])


def start_token(model: ModelSpec) -> int | None:
    """Return the token a text starts from: the one for that, or one that ends the text before."""
    if model.bos_token_id is not None:
        return model.bos_token_id
    return model.eos_token_ids[0] if model.eos_token_ids else None


def token_limit(max_new_tokens: object, prompt_length: int, context: int) -> int:
    """Return how many tokens may be chosen: as many as asked for, or as fit the context.

    The last token chosen is never fed, so it needs no place. Raises `RequestError`.
    """
    return min(check_positive("max_new_tokens", max_new_tokens), context - prompt_length + 1)


def check_positive(name: str, value: object) -> int:
    """Return `value` if it is an integer of at least 1, else raise `RequestError`."""
    return check_integer(name, value, 1)


def check_speculate(value: object) -> int:
    """Return `value` if it is a number of draft tokens a step may have, else `RequestError`."""
    return check_integer("speculate", value, 0, MOST_DRAFTS)
