"""Requests to `/completion`: llama.cpp's own protocol, with its names and its forms of prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_memllm.engine.request import MOST_TOP, check_tokens
from edge_memllm.sampling import FORBIDDEN, Penalties
from edge_memllm.server.calls import Call, Prompt, check_length, encoded_text, take_call
from edge_memllm.server.fields import BodyFields, blaming, checked_text, refused, shown
from edge_memllm.server.parameters import not_honoured, nothing_of
from edge_memllm.server.service import Service
from edge_memllm.server.settings import Limits

_UNSUPPORTED = not_honoured("llama")
_PROMPT_UNSUPPORTED = nothing_of("images and sound are not understood", multimodal_data=([],))
_MOST_FIELDS = 64
_MOST_FIELD = 256
_MOST_TOKENS = (1 << 31) - 1
_ANY_SEED = (-1, (1 << 32) - 1)  # llama.cpp's words for a seed that is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCall(Call):
    """A call, and what is told of its reply beside the text."""

    several: bool = False  # prompts, so that the reply is a list
    return_tokens: bool = False
    response_fields: tuple[str, ...] = ()  # all that is told; a path has slashes


def read_llama(fields: BodyFields, service: Service) -> LlamaCall:
    """Return the call that an object stands for. Raises `ApiError`."""
    limits, tokenizer = service.settings.limits, service.model.tokenizer
    service.check_model(fields)
    if fields.peek("seed") in _ANY_SEED:
        fields.value("seed")
    call = take_call(fields, service, words=tokenizer)
    several, prompts = _take_prompts(fields, limits)
    top = fields.optional_integer("n_probs", 0, MOST_TOP) or None
    of_sampling = fields.flag("post_sampling_probs")
    return_tokens, told = fields.flag("return_tokens"), _take_response_fields(fields)
    asked = _take_limit(fields)
    fields.finish(_UNSUPPORTED)
    request = call.request
    if request.ignore_eos and service.spec.eos_token_ids:  # there, such a text has none in it
        biases = dict.fromkeys(service.spec.eos_token_ids, FORBIDDEN)
        penalties = request.penalties or Penalties()
        bias = {**penalties.logit_bias, **biases}
        request = replace(request, penalties=replace(penalties, logit_bias=bias))
    ids = [_encoded(each, service) for each in prompts]
    room = service.spec.max_position_embeddings + 1
    request = replace(
        request,
        max_new_tokens=min(service.most_tokens, room) if asked is None else asked,
        top=top,
        top_of="sampling" if of_sampling else "model",
    )
    shared = {name: getattr(call, name) for name in Call.__dataclass_fields__}
    return LlamaCall(
        **{**shared, "request": request, "prompts": ids},
        several=several,
        return_tokens=return_tokens,
        response_fields=told,
    )


def _take_limit(fields: BodyFields) -> int | None:
    """Take how many tokens a reply may get; None for as many as the context holds."""
    asked = fields.optional_integer("n_predict", -1, _MOST_TOKENS)
    return None if asked is None or asked < 0 else asked


def _take_response_fields(fields: BodyFields) -> tuple[str, ...]:
    given, where = fields.optional_items("response_fields", _MOST_FIELDS), "response_fields"
    return tuple(
        checked_text(each, f"{where}[{number}]", _MOST_FIELD)
        for number, each in enumerate(given or ())
    )


def _take_prompts(fields: BodyFields, limits: Limits) -> tuple[bool, list[Prompt]]:
    """Take `prompt`, and whether it is several: a list without a number of its own is."""
    value, where = fields.required("prompt"), fields.param("prompt")
    if not isinstance(value, list) or any(map(_is_number, value)):
        return False, [_prompt(value, where, limits)]
    if not 0 < len(value) <= limits.choices:
        expected = f"a prompt, or a list of 1 to {limits.choices}"
        raise refused(where, f"{where} is {shown(value)}, expected {expected}.")
    return True, [_prompt(each, f"{where}[{n}]", limits) for n, each in enumerate(value)]


def _prompt(value: object, where: str, limits: Limits) -> Prompt:
    """Return a prompt: a text, an object that has one, or tokens with texts between them."""
    if isinstance(value, dict):
        fields = BodyFields.of(value, where)
        text = checked_text(fields.required("prompt_string"), where, limits.body_bytes)
        fields.finish(_PROMPT_UNSUPPORTED)
        return Prompt(text, where)
    if isinstance(value, list) and value:
        for number, each in enumerate(value):
            if isinstance(each, str):
                checked_text(each, f"{where}[{number}]", limits.body_bytes)
        return Prompt(value, where)
    return Prompt(checked_text(value, where, limits.body_bytes), where)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _encoded(prompt: Prompt, service: Service) -> list[int]:
    """Return the ids of a prompt; a text begins as the model was trained where it comes first."""
    value, where = prompt
    if isinstance(value, str):
        return encoded_text(value, service, where)
    check_length(len(value), service, where, least=True)
    ids: list[int] = []
    for number, each in enumerate(value):
        if isinstance(each, str):
            ids += encoded_text(each, service, where, special=not number)
        else:
            with blaming(f"{where}[{number}]"):
                ids += check_tokens([each], service.spec.vocab_size)
    check_length(len(ids), service, where)
    return ids
