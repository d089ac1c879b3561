"""The messages of a chat, checked: who says what, in text. What is not text is refused by name."""

from __future__ import annotations

from edge_memllm.serving.http.api_error import refused
from edge_memllm.serving.http.fields import BodyFields, checked_text, shown
from edge_memllm.serving.http.parameters import nothing_of
from edge_memllm.serving.http.settings import Limits

MOST_MESSAGES = 4096
MOST_NAME = 256
ROLES = ("system", "developer", "user", "assistant")
# OpenAI's newer word for the same: templates know the older one.
_ALIASES = {"developer": "system"}
_OTHER_ROLES = ("tool", "function")
# Fields of messages for what this server does not do, with values that ask for nothing.
_UNSUPPORTED = {
    **nothing_of("it has no tools", tool_calls=([],), tool_call_id=("",), function_call=()),
    **nothing_of("it takes text only", audio=()),
    **nothing_of(
        "a template makes no use of it",
        refusal=("",),
        annotations=([],),
        reasoning=("",),
        reasoning_content=("",),
    ),
}
_PART_UNSUPPORTED = nothing_of(
    "it takes text only", prompt_cache_breakpoint=(), cache_control=({"type": "ephemeral"},)
)

Message = dict[str, str]


def take_messages(fields: BodyFields, limits: Limits) -> list[Message]:
    """Take the field `messages`, of which there must be one at least."""
    where = fields.param("messages")
    values = fields.optional_items("messages", MOST_MESSAGES)
    if values is None:
        fields.required("messages")
    if not values:
        raise refused(where, f"{where} is a list of 0, expected a message at least.")
    return [
        _message(BodyFields.of(value, f"{where}[{number}]"), limits)
        for number, value in enumerate(values)
    ]


def _message(fields: BodyFields, limits: Limits) -> Message:
    role, where = fields.required("role"), fields.param("role")
    if role in _OTHER_ROLES:
        message = f"{where} is '{role}': this server does not support tools."
        raise refused(where, message, "unsupported_parameter")
    if not isinstance(role, str) or role not in ROLES:
        expected = ", ".join(ROLES)
        raise refused(where, f"{where} is {shown(role)}, expected one of {expected}.")
    content = fields.value("content")
    name = fields.bounded_text("name", MOST_NAME)
    fields.finish(_UNSUPPORTED)
    text = _text(content, fields.param("content"), limits.body_bytes)
    found = {"role": _ALIASES.get(role, role), "content": text}
    return found if name is None else {**found, "name": name}


def _text(content: object, where: str, most: int) -> str:
    """Return the text of a message, which may come in parts."""
    if content is None:
        raise refused(where, f"{where} is missing.", "missing_required_parameter")
    if not isinstance(content, list):
        return checked_text(content, where, most)
    if not content:
        raise refused(where, f"{where} is a list of 0, expected a part at least.")
    return "".join(
        _part(BodyFields.of(each, f"{where}[{number}]"), most)
        for number, each in enumerate(content)
    )


def _part(fields: BodyFields, most: int) -> str:
    kind, where = fields.required("type"), fields.param("type")
    if kind != "text":
        message = f"{where} is {shown(kind)}: this server takes parts of type 'text' only."
        raise refused(where, message, "unsupported_parameter")
    text = checked_text(fields.required("text"), fields.param("text"), most)
    fields.finish(_PART_UNSUPPORTED)
    return text
