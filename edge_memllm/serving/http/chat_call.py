"""A request to `/v1/chat/completions`, read; the model's template makes its prompt."""

from __future__ import annotations

from edge_memllm.errors import RequestError
from edge_memllm.serving.http.api_error import ApiError, refused
from edge_memllm.serving.http.call import Call
from edge_memllm.serving.http.fields import BodyFields
from edge_memllm.serving.http.generation_fields import take_wishes
from edge_memllm.serving.http.messages import Message, take_messages
from edge_memllm.serving.http.parameters import not_honoured
from edge_memllm.serving.http.prompts import encoded_text
from edge_memllm.serving.http.service import Service

MOST_TOP = 20
_UNSUPPORTED = not_honoured("chat")


def read_chat(fields: BodyFields, service: Service) -> Call:
    """Return the call that an object stands for. Raises `ApiError`."""
    limits, model = service.settings.limits, service.model
    service.check_model(fields)
    messages = take_messages(fields, limits)
    wishes = take_wishes(fields, model, limits)
    top = _take_top(fields)
    max_tokens = _take_max_tokens(fields, service.most_tokens)
    context = model.manifest.model.max_position_embeddings
    fields.finish(_UNSUPPORTED)
    return Call(
        wishes=wishes,
        prompts=[_prompt(messages, service)],
        max_tokens=max_tokens or min(service.most_tokens, context),
        top=top,
    )


def _take_top(fields: BodyFields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.optional_integer("top_logprobs", 0, MOST_TOP)
    if top and not wanted:
        where = fields.param("top_logprobs")
        raise refused(where, f"{where} needs logprobs true. Add it, or leave {where} out.")
    return (top or 0) if wanted else None


def _take_max_tokens(fields: BodyFields, most: int) -> int | None:
    """Take the limit under its new name or its old one."""
    name, old = "max_completion_tokens", "max_tokens"
    new_value, old_value = (fields.optional_integer(each, 1, most) for each in (name, old))
    if None not in (new_value, old_value) and new_value != old_value:
        raise refused(name, f"{name} is {new_value} and {old} is {old_value}. Give one of them.")
    return new_value or old_value


def _prompt(messages: list[Message], service: Service) -> list[int]:
    if service.template is None:
        raise ApiError(
            400,
            f"The model '{service.settings.model_id}' has no chat template, so it cannot chat. "
            "Use /v1/completions, or start the server with --chat-template FILE.",
            code="no_chat_template",
        )
    try:
        text = service.template.render(messages)
    except RequestError as error:
        raise refused("messages", str(error)) from error
    return encoded_text(text, service, "messages", special=False)
