"""Requests to `/v1/messages`, Anthropic's shape: blocks become the messages of a chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edge_memllm.server.calls import MOST_USER, Call, take_request, with_chat
from edge_memllm.server.fields import BodyFields, checked_text, refused, shown
from edge_memllm.server.messages import (
    MOST_MESSAGES,
    MOST_NAME,
    Chat,
    Choice,
    Message,
    can_reason,
    checked_tools,
    is_begun,
    role_of,
    take_function,
    tool_use,
    writes_several,
)
from edge_memllm.server.parameters import EPHEMERAL, not_honoured, nothing_of
from edge_memllm.server.protocols.keep_alive import take_keep_alive
from edge_memllm.server.service import Service
from edge_memllm.server.settings import Limits
from edge_memllm.text.tools.formats import Tool

_UNSUPPORTED = not_honoured("messages")
_KEPT: Mapping[str, Any] = {"cache_control": EPHEMERAL}
_BLOCK_UNSUPPORTED = nothing_of(
    "it takes text only", citations=([],), caller=(), toolset_name=(), **_KEPT
)
_TOOL_UNSUPPORTED = nothing_of(
    "tools are described by name, description and input_schema",
    defer_loading=(False,),
    eager_input_streaming=(False, True),
    input_examples=([],),
    allowed_callers=(["direct"],),
    **_KEPT,
)
_NEEDS = {"auto": "auto", "any": "required", "tool": "required", "none": None}


def read_message(fields: BodyFields, service: Service) -> Call:
    """Return the call that an object stands for. Raises `ApiError`."""
    service.check_model(fields)
    chat, choice, parallel = _take_chat(fields, service)
    stream = fields.flag("stream")
    call = Call(
        request=take_request(fields, service, "stop_sequences"),
        form=None,
        stream=stream,
        user=_take_user(fields),
        keep_alive=take_keep_alive(fields),
    )
    most = fields.optional_integer("max_tokens", 1, service.most_tokens)
    if most is None:
        fields.required("max_tokens")
    fields.finish(_UNSUPPORTED)
    use = tool_use(chat.tools, choice, service, parallel=parallel)
    return with_chat(call, _of_choice(chat, choice), use, most, service)


def read_counted(fields: BodyFields, service: Service) -> Chat:
    """Return the chat whose tokens are to be counted. Raises `ApiError`."""
    service.check_model(fields)
    chat, choice, _ = _take_chat(fields, service)
    fields.finish(_UNSUPPORTED)
    return _of_choice(chat, choice)


def _of_choice(chat: Chat, choice: Choice) -> Chat:
    """Return the chat as the model gets it: it is told of tools only where it may call some."""
    return chat if choice.need is not None else chat._replace(tools=())


def _take_chat(fields: BodyFields, service: Service) -> tuple[Chat, Choice, bool]:
    """Take messages and tools, which of them may be called, and whether several at once."""
    limits = service.settings.limits
    messages = [*_system(fields, limits), *_messages(fields, limits)]
    tools = _take_tools(fields, limits)
    choice, parallel = _take_choice(fields, writes_several(service))
    last = messages[-1]
    variables = _take_thinking(fields, service)
    chat = Chat(messages, tools, continued=is_begun(last), variables=variables)
    return chat, choice, parallel


def _system(fields: BodyFields, limits: Limits) -> Iterator[Message]:
    value = fields.value("system")
    if value:
        yield {"role": "system", "content": _text(value, fields.param("system"), limits)}


def _text(value: object, where: str, limits: Limits) -> str:
    """Return a text that may come in blocks."""
    if not isinstance(value, list):
        return checked_text(value, where, limits.body_bytes)
    return "".join(
        _text_of(_block(each, f"{where}[{number}]"), limits, ("text",))
        for number, each in enumerate(value)
    )


def _block(value: object, where: str) -> BodyFields:
    return BodyFields.of(value, where)


def _text_of(fields: BodyFields, limits: Limits, kinds: tuple[str, ...]) -> str:
    """Take the text of a block that has to be one of text; `kinds` are those there may be."""
    kind, where = fields.required("type"), fields.param("type")
    if kind != "text":
        expected = ", ".join(f"'{each}'" for each in kinds)
        message = f"{where} is {shown(kind)}: this server takes blocks of the types {expected} here"
        raise refused(where, f"{message}.", "unsupported_parameter")
    text = checked_text(fields.required("text"), fields.param("text"), limits.body_bytes)
    fields.finish(_BLOCK_UNSUPPORTED)
    return text


def _messages(fields: BodyFields, limits: Limits) -> Iterator[Message]:
    values, where = fields.optional_items("messages", MOST_MESSAGES), fields.param("messages")
    if values is None:
        fields.required("messages")
    if not values:
        raise refused(where, f"{where} is a list of 0, expected a message at least.")
    names: dict[str, str] = {}
    for number, value in enumerate(values):
        yield from _message(BodyFields.of(value, f"{where}[{number}]"), names, limits)


def _message(fields: BodyFields, names: dict[str, str], limits: Limits) -> Iterator[Message]:
    """Yield the messages of one: results of tools are messages of their own."""
    role = role_of(fields, ("user", "assistant"))
    content, where = fields.required("content"), fields.param("content")
    fields.finish()
    if not isinstance(content, list):
        yield {"role": role, "content": checked_text(content, where, limits.body_bytes)}
        return
    if not content:
        raise refused(where, f"{where} is a list of 0, expected a block at least.")
    blocks = [_block(each, f"{where}[{number}]") for number, each in enumerate(content)]
    yield from (_from_assistant if role == "assistant" else _from_user)(blocks, role, names, limits)


def _from_user(
    blocks: list[BodyFields], role: str, names: dict[str, str], limits: Limits
) -> Iterator[Message]:
    texts: list[str] = []
    for block in blocks:
        if block.peek("type") == "tool_result":
            yield _result(block, names, limits)
        else:
            texts.append(_text_of(block, limits, ("text", "tool_result")))
    if texts:
        yield {"role": role, "content": "".join(texts)}


def _from_assistant(
    blocks: list[BodyFields], role: str, names: dict[str, str], limits: Limits
) -> Iterator[Message]:
    texts, calls, thoughts = list[str](), list[Message](), list[str]()
    for block in blocks:
        kind = block.peek("type")
        if kind == "tool_use":
            calls.append(_call(block, names))
        elif kind == "thinking":
            thoughts.append(_thought(block, limits))
        else:
            texts.append(_text_of(block, limits, ("text", "thinking", "tool_use")))
    found: Message = {"role": role, "content": "".join(texts)} if texts else {"role": role}
    if thoughts:
        found["reasoning_content"] = "\n".join(thoughts)
    yield {**found, "tool_calls": calls} if calls else found


def _thought(fields: BodyFields, limits: Limits) -> str:
    fields.value("type")
    fields.value("signature")  # of whoever made it
    where = fields.param("thinking")
    text = checked_text(fields.required("thinking"), where, limits.body_bytes)
    fields.finish(_BLOCK_UNSUPPORTED)
    return text


def _take_thinking(fields: BodyFields, service: Service) -> Mapping[str, bool]:
    """Take whether to reason; a model that does not is asked for nothing by `disabled` alone."""
    if not can_reason(service) or fields.peek("thinking") is None:
        return {}
    thinking = fields.required_group("thinking")
    kind, where = thinking.required("type"), thinking.param("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        expected = "enabled, adaptive or disabled"
        raise refused(where, f"{where} is {shown(kind)}, expected {expected}.")
    thinking.optional_integer("budget_tokens", 1, 1 << 31)  # models know no budget
    thinking.value("display")
    thinking.finish()
    return {"enable_thinking": kind != "disabled"}


def _call(fields: BodyFields, names: dict[str, str]) -> Message:
    fields.value("type")
    id, name = (
        checked_text(fields.required(each), fields.param(each), MOST_NAME)
        for each in ("id", "name")
    )
    arguments, where = fields.required("input"), fields.param("input")
    if not isinstance(arguments, dict):
        raise refused(where, f"{where} is {shown(arguments)}, expected an object.")
    fields.finish(_BLOCK_UNSUPPORTED)
    names[id] = name
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(fields: BodyFields, names: Mapping[str, str], limits: Limits) -> Message:
    fields.value("type")
    where = fields.param("tool_use_id")
    id = checked_text(fields.required("tool_use_id"), where, MOST_NAME)
    if id not in names:
        raise refused(where, f"{where} is {shown(id)}, and no message before it uses a tool so.")
    content = fields.value("content")
    text = "" if content is None else _text(content, fields.param("content"), limits)
    if fields.flag("is_error"):
        text = f"Error: {text}"
    fields.finish(_BLOCK_UNSUPPORTED)
    return {"role": "tool", "tool_call_id": id, "name": names[id], "content": text}


def _take_tools(fields: BodyFields, limits: Limits) -> list[Tool]:
    values, where = fields.optional_items("tools", limits.tools) or [], fields.param("tools")
    found = (_tool(BodyFields.of(value, f"{where}[{n}]")) for n, value in enumerate(values))
    return checked_tools(found, where, limits)


def _tool(fields: BodyFields) -> Tool:
    kind, where = fields.value("type"), fields.param("type")
    if kind not in (None, "custom"):
        raise refused(
            where,
            f"{where} is {shown(kind)}: this server has no tools of its own. Leave it out, or give "
            "a tool with input_schema and run it yourself.",
            "unsupported_parameter",
        )
    if fields.peek("input_schema") is None:
        fields.required("input_schema")
    found = take_function(fields, schema="input_schema", unsupported=_TOOL_UNSUPPORTED)
    return replace(found, given=None)


def _take_choice(fields: BodyFields, several: bool) -> tuple[Choice, bool]:
    """Take which tools may be called, and whether several at once: `several` if nothing is said."""
    given = fields.group("tool_choice")
    if given is None:
        return Choice(), several
    kind, where = given.required("type"), given.param("type")
    if not isinstance(kind, str) or kind not in _NEEDS:
        expected = ", ".join(f"'{each}'" for each in _NEEDS)
        raise refused(where, f"{where} is {shown(kind)}, expected one of {expected}.")
    names = None
    if kind == "tool":
        names = [checked_text(given.required("name"), given.param("name"), MOST_NAME)]
    several = not given.flag("disable_parallel_tool_use", default=not several)
    given.finish()
    return Choice(_NEEDS[kind], names), several  # type: ignore[arg-type]


def _take_user(fields: BodyFields) -> str:
    metadata = fields.group("metadata")
    if metadata is None:
        return ""
    user = metadata.bounded_text("user_id", MOST_USER) or ""
    metadata.finish()
    return user
