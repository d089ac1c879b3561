"""Prompts as a client gives them, to token ids that fit: a text, token ids, or a list of either."""

from __future__ import annotations

from typing import NamedTuple

from edge_memllm.long_text import BLOCK, tokens_beyond
from edge_memllm.request import check_tokens
from edge_memllm.serving.http.api_error import ApiError, blaming, refused
from edge_memllm.serving.http.fields import BodyFields, checked_text, shown
from edge_memllm.serving.http.service import Service
from edge_memllm.serving.http.settings import Limits

# Shorter texts are tokenized in less time than it would take to say how long they are.
_SHORT = 4096


class Prompt(NamedTuple):
    """One prompt as it was given, and where in the request it stands."""

    value: str | list[object]
    where: str


def take_prompts(fields: BodyFields, most: int, limits: Limits) -> list[Prompt]:
    """Take the field `prompt`: at most `most` texts or lists of ids, not looked into yet."""
    value, where = fields.required("prompt"), fields.param("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and _is_number(value[0])):
        return [_checked(value, where, limits)]
    if not isinstance(value, list) or not value:
        expected = "a text, a list of token ids, or a list of those"
        raise refused(where, f"{where} is {shown(value)}, expected {expected}.")
    if len(value) > most:
        raise refused(
            where,
            f"{where} holds {len(value)} prompts, expected at most {most}: a request may have "
            f"{limits.choices} replies, n for each prompt.",
        )
    return [_checked(each, f"{where}[{number}]", limits) for number, each in enumerate(value)]


def encoded(prompt: Prompt, service: Service) -> list[int]:
    """Return the ids of a prompt. Raises `ApiError` for one that does not fit the context."""
    value, where = prompt
    if isinstance(value, str):
        return encoded_text(value, service, where)
    _check_length(len(value), service, where)
    with blaming(where):
        return check_tokens(value, service.spec.vocab_size)


def encoded_text(text: str, service: Service, where: str, *, special: bool = True) -> list[int]:
    """Return the ids of a text; what cannot fit is refused before, or while, it is tokenized."""
    tokenizer = service.model.tokenizer
    if len(text) > _SHORT:
        _check_length(service.token_bound.fewest(len(text)), service, where, least=True)
    if len(text) > BLOCK:
        beyond = tokens_beyond(tokenizer, text, _room(service))
        _check_length(beyond or 0, service, where, least=True)
    ids = tokenizer.encode(text, special=special)
    _check_length(len(ids), service, where)
    return ids


def _room(service: Service) -> int:
    """Return how many tokens a prompt may have."""
    context, limit = service.spec.max_position_embeddings, service.settings.limits.prompt_tokens
    return context if limit is None else min(context, limit)


def _check_length(length: int, service: Service, where: str, *, least: bool = False) -> None:
    """Refuse what is too long.

    In words that clients look for, so that they know to shorten it: litellm for the first half
    sentence, langchain-openai for "prompt is too long".
    """
    room, context = _room(service), service.spec.max_position_embeddings
    if length <= room:
        return
    own = "" if room == context else f", and this server takes prompts of at most {room}"
    what, it = ("messages", "your messages") if where == "messages" else ("prompt", "it")
    raise ApiError(
        400,
        f"This model's maximum context length is {context} tokens{own}. However, your prompt is "
        f"too long: {it} resulted in {'at least ' if least else ''}{length} tokens. Please reduce "
        f"the length of the {what}.",
        code="context_length_exceeded",
        param=where,
    )


def _checked(value: object, where: str, limits: Limits) -> Prompt:
    if isinstance(value, list):
        if not value:
            raise refused(where, f"{where} is a list of no tokens, expected one at least.")
        return Prompt(value, where)
    return Prompt(checked_text(value, where, limits.body_bytes), where)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
