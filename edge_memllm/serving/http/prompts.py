"""Prompts as a client gives them, to token ids that fit: a text, token ids, or a list of either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edge_memllm.model import Model
from edge_memllm.request import check_tokens
from edge_memllm.serving.http.api_error import ApiError, blaming, refused
from edge_memllm.serving.http.fields import Fields, checked_text, shown
from edge_memllm.serving.http.settings import Limits


class Prompt(NamedTuple):
    """One prompt as it was given, and where in the request it stands."""

    value: str | list[object]
    where: str


def take_prompts(fields: Fields, most: int, limits: Limits) -> list[Prompt]:
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


def encoded(prompt: Prompt, model: Model, limits: Limits) -> list[int]:
    """Return the ids of a prompt. Raises `ApiError` for one that does not fit the context."""
    spec, (value, where) = model.manifest.model, prompt
    if isinstance(value, str):
        ids = model.tokenizer.encode(value)
    else:
        with blaming(where):
            ids = check_tokens(value, spec.vocab_size)
    check_length(ids, spec.max_position_embeddings, where, limits)
    return ids


def check_length(ids: Sequence[int], context: int, where: str, limits: Limits) -> None:
    """Refuse a prompt that is longer than the context, or than the server lets it be."""
    if len(ids) > context:
        raise ApiError(
            400,
            f"The prompt has {len(ids)} tokens and the model's context holds {context}. "
            "Shorten it.",
            code="context_length_exceeded",
            param=where,
        )
    if limits.prompt_tokens is not None and len(ids) > limits.prompt_tokens:
        raise ApiError(
            400,
            f"The prompt has {len(ids)} tokens, and this server takes at most "
            f"{limits.prompt_tokens}. Shorten it.",
            code="prompt_too_long",
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
