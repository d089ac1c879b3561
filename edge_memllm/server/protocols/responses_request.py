"""Requests to `/v1/responses`: items and instructions become a chat.

Nothing is stored, so each request has the whole conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edge_memllm.engine.response_format import ResponseFormat
from edge_memllm.server.calls import (
    MOST_TOP,
    Call,
    answer_of,
    take_hints,
    take_request,
    take_telling,
    take_user,
    with_chat,
)
from edge_memllm.server.fields import (
    BodyFields,
    checked_text,
    refused,
    shown,
)
from edge_memllm.server.forms import WantedForm, take_json_schema
from edge_memllm.server.messages import (
    EFFORTS,
    MOST_MESSAGES,
    MOST_NAME,
    ROLES_OF_TEXT,
    Chat,
    Message,
    can_reason,
    check_arguments,
    checked_tools,
    role_of,
    take_choice,
    take_function,
    take_parallel,
    tool_use,
)
from edge_memllm.server.parameters import not_honoured, nothing_of
from edge_memllm.server.protocols.keep_alive import take_keep_alive
from edge_memllm.server.service import Service
from edge_memllm.server.settings import Limits
from edge_memllm.text.tools.formats import Tool

_UNSUPPORTED = not_honoured("responses")
_KINDS = ("text", "json_object", "json_schema")
_TEXT_UNSUPPORTED = nothing_of("this model has one way of answering", verbosity=("medium",))
_STREAM_UNSUPPORTED = nothing_of("events are not padded", include_obfuscation=(False,))
# What items have that a reply had, and that says nothing of their text.
_ITEM_UNSUPPORTED = nothing_of("it means nothing here", phase=(), caller=(), namespace=())
_PART_UNSUPPORTED = nothing_of("it takes text only", annotations=([],))
_LOGPROBS = "message.output_text.logprobs"
# Reasoning is never hidden: there is nothing encrypted to tell.
_INCLUDED = (_LOGPROBS, "reasoning.encrypted_content")
_THOUGHT = {"role", "reasoning_content"}
_REASONING_UNSUPPORTED = nothing_of(
    "all of the reasoning is told", summary=("auto", "detailed"), generate_summary=("auto",)
)
_PARTS = ("input_text", "output_text", "text")


def read_response(fields: BodyFields, service: Service) -> Call:
    """Return the call that an object stands for. Raises `ApiError`."""
    limits = service.settings.limits
    service.check_model(fields)
    repeated = _repeated(fields)
    instructions = fields.bounded_text("instructions", limits.body_bytes)
    messages = [*_messages(fields, limits)]
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    tools, choice = _take_tools(fields, limits), take_choice(fields)
    parallel = take_parallel(fields, service)
    form = _take_format(fields, limits)
    stream = fields.flag("stream")
    options = fields.group("stream_options")
    if options is not None:
        options.finish(_STREAM_UNSUPPORTED)
    take_hints(fields)
    thinking = _take_reasoning(fields, service)
    progress, timings = take_telling(fields)
    call = Call(
        request=replace(
            take_request(fields, service),
            top=_take_top(fields),
            progress=progress or timings,
        ),
        form=form,
        stream=stream,
        progress=progress,
        timings=timings,
        user=take_user(fields),
        keep_alive=take_keep_alive(fields),
        repeated={**repeated, "parallel_tool_calls": parallel},
    )
    most = fields.optional_integer("max_output_tokens", 1, service.most_tokens)
    fields.finish(_UNSUPPORTED)
    answer = answer_of(form) if tools else None
    use = tool_use(tools, choice, service, parallel=parallel, answer=answer)
    chat = Chat(messages, () if choice.need is None else tools, variables=thinking)
    return with_chat(call, chat, use, most, service, "input")


def _take_reasoning(fields: BodyFields, service: Service) -> Mapping[str, Any]:
    """Take how much is to be reasoned, where the model does."""
    if not can_reason(service) or fields.peek("reasoning") is None:
        return {}
    given = fields.required_group("reasoning")
    effort, where = given.value("effort"), given.param("effort")
    if effort is not None and effort not in EFFORTS:
        raise refused(where, f"{where} is {shown(effort)}, expected one of {', '.join(EFFORTS)}.")
    given.finish(_REASONING_UNSUPPORTED)
    return (
        {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    )


def _take_top(fields: BodyFields) -> int | None:
    """Take how many likeliest tokens to tell with each, 0 for its own likelihood; None for none."""
    where = fields.param("include")
    wanted = fields.optional_items("include", len(_INCLUDED)) or []
    for each in wanted:
        if each not in _INCLUDED:
            expected = " or ".join(f"'{name}'" for name in _INCLUDED)
            message = f"{where} has {shown(each)}, expected {expected}."
            raise refused(where, message, "unsupported_parameter")
    top = fields.optional_integer("top_logprobs", 0, MOST_TOP)
    return (top or 0) if top or _LOGPROBS in wanted else None


def _repeated(fields: BodyFields) -> Mapping[str, Any]:
    """Return what a reply repeats of its request."""
    sampling = {name: fields.peek(name) for name in ("temperature", "top_p")}
    return {
        "instructions": fields.peek("instructions"),
        "max_output_tokens": fields.peek("max_output_tokens"),
        "metadata": fields.peek("metadata") or {},
        "text": fields.peek("text") or {"format": {"type": "text"}},
        "tool_choice": fields.peek("tool_choice") or "auto",
        "tools": fields.peek("tools") or [],
        "top_logprobs": fields.peek("top_logprobs") or 0,
        **sampling,
    }


def _messages(fields: BodyFields, limits: Limits) -> Iterator[Message]:
    """Yield the messages of `input`; calls that follow each other, or a text, are one message."""
    value, where = fields.required("input"), fields.param("input")
    if isinstance(value, str):
        yield {"role": "user", "content": checked_text(value, where, limits.body_bytes)}
        return
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        expected = f"a text, or a list of 1 to {MOST_MESSAGES} items"
        raise refused(where, f"{where} is {shown(value)}, expected {expected}.")
    last: Message | None = None
    names: dict[str, str] = {}
    for number, each in enumerate(value):
        found = _item(BodyFields.of(each, f"{where}[{number}]"), names, limits)
        if last is not None and {*last} == _THOUGHT and found["role"] == "assistant":
            last = {**last, **found}  # what it led to
            continue
        if last is not None and last["role"] == "assistant" and "tool_calls" in found:
            last = {**last, "tool_calls": [*last.get("tool_calls", ()), *found["tool_calls"]]}
            continue
        if last is not None:
            yield last
        last = found
    assert last is not None
    yield last


def _item(fields: BodyFields, names: dict[str, str], limits: Limits) -> Message:
    """Return the message of an item; `names` has the calls before it, by their ids."""
    default = "message" if fields.peek("role") is not None else None
    kind, where = fields.value("type") or default, fields.param("type")
    fields.value("id")
    fields.value("status")
    match kind:
        case "message":
            return _text_message(fields, limits)
        case "reasoning":
            return _reasoning(fields, limits)
        case "function_call":
            return _call(fields, names, limits)
        case "function_call_output":
            return _output(fields, names, limits)
        case "item_reference":
            message = f"{where} is 'item_reference', and replies are not stored."
            raise refused(where, f"{message} Give the item itself.", "unsupported_parameter")
    expected = "message, function_call or function_call_output"
    raise refused(where, f"{where} is {shown(kind)}, expected {expected}.")


def _reasoning(fields: BodyFields, limits: Limits) -> Message:
    """Return a message of reasoning alone; what it led to comes behind it."""
    fields.value("encrypted_content")
    texts = [
        checked_text(part.required("text"), part.param("text"), limits.body_bytes)
        for name in ("content", "summary")
        for number, each in enumerate(fields.optional_items(name, MOST_MESSAGES) or ())
        for part in (BodyFields.of(each, f"{fields.param(name)}[{number}]"),)
    ]
    fields.finish(_ITEM_UNSUPPORTED)
    return {"role": "assistant", "reasoning_content": "\n".join(texts)}


def _text_message(fields: BodyFields, limits: Limits) -> Message:
    role = role_of(fields, ROLES_OF_TEXT)
    content = _text(fields, "content", limits)
    fields.finish(_ITEM_UNSUPPORTED)
    return {"role": role, "content": content}


def _call(fields: BodyFields, names: dict[str, str], limits: Limits) -> Message:
    id, name = (
        checked_text(fields.required(each), fields.param(each), MOST_NAME)
        for each in ("call_id", "name")
    )
    where = fields.param("arguments")
    arguments = checked_text(fields.required("arguments"), where, limits.body_bytes)
    check_arguments(arguments, where)
    fields.finish(_ITEM_UNSUPPORTED)
    names[id] = name
    function = {"name": name, "arguments": arguments}
    call = {"id": id, "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


def _output(fields: BodyFields, names: Mapping[str, str], limits: Limits) -> Message:
    where = fields.param("call_id")
    id = checked_text(fields.required("call_id"), where, MOST_NAME)
    if id not in names:
        raise refused(where, f"{where} is {shown(id)}, and no item before it is a call of that id.")
    content = _text(fields, "output", limits)
    fields.finish(_ITEM_UNSUPPORTED)
    return {"role": "tool", "tool_call_id": id, "name": names[id], "content": content}


def _text(fields: BodyFields, name: str, limits: Limits) -> str:
    value, where = fields.required(name), fields.param(name)
    if not isinstance(value, list):
        return checked_text(value, where, limits.body_bytes)
    parts = (BodyFields.of(each, f"{where}[{number}]") for number, each in enumerate(value))
    return "".join(_part(part, limits) for part in parts)


def _part(fields: BodyFields, limits: Limits) -> str:
    kind, where = fields.required("type"), fields.param("type")
    if kind not in _PARTS:
        message = f"{where} is {shown(kind)}: this server takes parts of text only, 'input_text' or"
        raise refused(where, f"{message} 'output_text'.", "unsupported_parameter")
    text = checked_text(fields.required("text"), fields.param("text"), limits.body_bytes)
    fields.value("logprobs")  # of a reply that is handed back
    fields.finish(_PART_UNSUPPORTED)
    return text


def _take_tools(fields: BodyFields, limits: Limits) -> list[Tool]:
    values, where = fields.optional_items("tools", limits.tools) or [], fields.param("tools")
    found = (_tool(BodyFields.of(value, f"{where}[{n}]")) for n, value in enumerate(values))
    return checked_tools(found, where, limits)


def _tool(fields: BodyFields) -> Tool:
    kind, where = fields.required("type"), fields.param("type")
    if kind != "function":
        raise refused(
            where,
            f"{where} is {shown(kind)}: this server has no tools of its own. Leave it out, or give "
            "a tool of type 'function' and run it yourself.",
            "unsupported_parameter",
        )
    return take_function(fields, {"type": "function", "function": dict(fields.values)})


def _take_format(fields: BodyFields, limits: Limits) -> WantedForm | None:
    text = fields.group("text")
    wanted = None if text is None else text.group("format")
    if text is not None:
        text.finish(_TEXT_UNSUPPORTED)
    if wanted is None:
        return None
    kind, where = wanted.required("type"), wanted.param("type")
    if kind not in _KINDS:
        expected = " or ".join(f"'{each}'" for each in _KINDS)
        raise refused(where, f"{where} is {shown(kind)}, expected {expected}.")
    if kind == "json_schema":
        return take_json_schema(wanted, limits.schema_bytes)
    wanted.finish()
    return None if kind == "text" else WantedForm(ResponseFormat("json_object"), where)
