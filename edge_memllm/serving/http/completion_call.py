"""A request to `/v1/completions`, read."""

from __future__ import annotations

from functools import partial

from edge_memllm.serving.http.api_error import refused
from edge_memllm.serving.http.call import Call
from edge_memllm.serving.http.fields import BodyFields
from edge_memllm.serving.http.generation_fields import take_wishes
from edge_memllm.serving.http.parameters import not_honoured
from edge_memllm.serving.http.prompts import Prompt, encoded, take_prompts
from edge_memllm.serving.http.service import Service

# OpenAI's default.
MAX_TOKENS = 16
MOST_TOP = 20
_UNSUPPORTED = not_honoured("completions")


def read_completion(fields: BodyFields, service: Service) -> Call:
    """Return the call that an object stands for. Raises `ApiError`."""
    limits = service.settings.limits
    service.check_model(fields)
    wishes = take_wishes(fields, service.model, limits)
    _check_best_of(fields, wishes.choices)
    prompts = take_prompts(fields, limits.choices // wishes.choices, limits)
    most = service.most_tokens
    given = fields.optional_integer("max_tokens", 0, most)
    top = _take_top(fields)
    echo = fields.flag("echo")
    fields.finish(_UNSUPPORTED)
    ids = [encoded(each, service) for each in prompts]
    return Call(
        wishes=wishes,
        prompts=ids,
        max_tokens=min(MAX_TOKENS, most) if given is None else given,
        top=top,
        echo=[*map(partial(_text, service), prompts, ids)] if echo else None,
    )


def _take_top(fields: BodyFields) -> int | None:
    """Take how many likeliest tokens to tell; false, which is chat's word, tells nothing."""
    if fields.peek("logprobs") is False:
        fields.value("logprobs")
    return fields.optional_integer("logprobs", 0, MOST_TOP)


def _check_best_of(fields: BodyFields, choices: int) -> None:
    best_of = fields.optional_integer("best_of", 0, 1 << 31)
    if best_of is not None and best_of != choices:
        raise refused(
            "best_of",
            f"best_of is {best_of} and n is {choices}: this server does not choose among replies. "
            "Leave best_of out, or ask for n replies with logprobs and choose yourself.",
            "unsupported_parameter",
        )


def _text(service: Service, prompt: Prompt, ids: list[int]) -> str:
    """Return what a reply that repeats its prompt begins with."""
    given = prompt.value
    return given if isinstance(given, str) else service.model.tokenizer.decode(ids)
