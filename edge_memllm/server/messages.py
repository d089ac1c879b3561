"""The messages of a chat, and the tools that it may use, as a request has them.

Takes OpenAI's shape, and makes the prompt of it. The other protocols are turned into that shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from edge_memllm.engine.tool_use import Need, ToolUse
from edge_memllm.errors import RequestError
from edge_memllm.server.fields import (
    NOTHING,
    ApiError,
    BodyFields,
    checked_text,
    refused,
    shown,
)
from edge_memllm.server.parameters import EPHEMERAL, Parameter, nothing_of
from edge_memllm.server.service import Service
from edge_memllm.server.settings import Limits
from edge_memllm.text.chat import ChatTemplate
from edge_memllm.text.reasoning import closed, reasoning_of
from edge_memllm.text.tools.formats import NAME, Tool
from edge_memllm.text.tools.prompt import template_format, with_tools

MOST_MESSAGES = 4096
MOST_NAME = 256
_MOST_CALLS = 128  # of one message
ROLES_OF_TEXT = ("system", "developer", "user", "assistant")
ROLES = (*ROLES_OF_TEXT, "tool")
# OpenAI's newer word for the same: templates know the older one.
_ALIASES = {"developer": "system"}
# Fields of messages for what this server does not do, with values that ask for nothing.
_MESSAGE_UNSUPPORTED = {
    **nothing_of(
        "calls are under tool_calls, and their results in messages of the role tool",
        function_call=(),
    ),
    **nothing_of("it takes text only", audio=()),
    **nothing_of(
        "a template makes no use of it",
        refusal=("",),
        annotations=([],),
    ),
}
_PART_UNSUPPORTED = nothing_of(
    "it takes text only", prompt_cache_breakpoint=(), cache_control=EPHEMERAL
)

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_MOST_VARIABLES = 32
_CONTINUING, _ANSWERED = "continue_final_message", "add_generation_prompt"
# What a template is given from other fields, or from the model.
_GIVEN = (
    *("messages", "tools", "documents", _ANSWERED, _CONTINUING),
    *("bos_token", "eos_token"),
)

Message = dict[str, Any]


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
    if fields.peek("role") == "function":
        where = fields.param("role")
        message = f"{where} is 'function'. Use the role 'tool', with tool_call_id."
        raise refused(where, message, "unsupported_parameter")
    role = role_of(fields, ROLES)
    found: Message = {"role": role}
    if role == "assistant":
        fields.value("parsed")  # as below
        calls = _take_calls(fields, limits)
        for key in ("reasoning_content", "reasoning"):  # as servers give it, of either name
            if thought := fields.bounded_text(key, limits.body_bytes):
                found["reasoning_content"] = thought
        if calls:
            found["tool_calls"] = calls
    elif fields.peek("tool_calls") == []:
        fields.value("tool_calls")
    if role == "tool":
        found["tool_call_id"] = checked_text(
            fields.required("tool_call_id"), fields.param("tool_call_id"), MOST_NAME
        )
    content = fields.value("content")
    name = fields.bounded_text("name", MOST_NAME)
    fields.finish(_MESSAGE_UNSUPPORTED)
    if content is not None or "tool_calls" not in found:
        found["content"] = _text(content, fields.param("content"), limits.body_bytes)
    return found if name is None else {**found, "name": name}


def role_of(fields: BodyFields, roles: Sequence[str]) -> str:
    """Take the role of a message, under the name that templates know it by."""
    role, where = fields.required("role"), fields.param("role")
    if not isinstance(role, str) or role not in roles:
        expected = ", ".join(roles)
        raise refused(where, f"{where} is {shown(role)}, expected one of {expected}.")
    return _ALIASES.get(role, role)


def check_arguments(text: str, where: str) -> None:
    """Raise `ApiError` unless a text is a JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise refused(where, f"{where} is {shown(text)}, expected the text of a JSON object.")


def _take_calls(fields: BodyFields, limits: Limits) -> list[Message]:
    where = fields.param("tool_calls")
    values = fields.optional_items("tool_calls", _MOST_CALLS) or []
    return [
        _call(BodyFields.of(value, f"{where}[{number}]"), limits)
        for number, value in enumerate(values)
    ]


def _call(fields: BodyFields, limits: Limits) -> Message:
    kind, where = fields.value("type"), fields.param("type")
    if kind not in (None, "function"):
        raise refused(where, f"{where} is {shown(kind)}, expected 'function'.")
    fields.value("index")  # as in the parts of a stream, which some clients hand back
    id = fields.bounded_text("id", MOST_NAME)
    function = fields.required_group("function")
    name = checked_text(function.required("name"), function.param("name"), MOST_NAME)
    arguments = function.value("arguments")
    if not isinstance(arguments, dict):
        arguments = checked_text(
            "" if arguments is None else arguments,
            function.param("arguments"),
            limits.body_bytes,
        )
    function.value("parsed_arguments")  # what OpenAI's client made of them, and hands back
    function.finish()
    fields.finish()
    call: Message = {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return call if id is None else {"id": id, **call}


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


class Choice(NamedTuple):
    """Which tools may be called, and whether one has to be."""

    need: Need | None = "auto"  # None where none may be
    names: Sequence[str] | None = None  # None for all


def take_tools(fields: BodyFields, limits: Limits) -> list[Tool]:
    """Take the field `tools`, in OpenAI's shape."""
    values = fields.optional_items("tools", limits.tools) or []
    where = fields.param("tools")
    return checked_tools(
        (_tool(BodyFields.of(value, f"{where}[{n}]")) for n, value in enumerate(values)),
        where,
        limits,
    )


def checked_tools(tools: Iterable[Tool], where: str, limits: Limits) -> list[Tool]:
    """Return tools of different names whose schemas are not too long together."""
    found = list(tools)
    names = [tool.name for tool in found]
    for name in names:
        if names.count(name) > 1:
            raise refused(where, f"{where} has two tools of the name {shown(name)}.")
    size = sum(len(json.dumps(tool.as_given())) for tool in found)
    if size > limits.tool_bytes:
        raise refused(where, f"{where} have {size} bytes, expected at most {limits.tool_bytes}.")
    return found


def _tool(fields: BodyFields) -> Tool:
    kind, where = fields.required("type"), fields.param("type")
    if kind != "function":
        message = f"{where} is {shown(kind)}: this server has no tools of its own, and takes"
        raise refused(where, f"{message} tools of type 'function' only.", "unsupported_parameter")
    function = fields.required_group("function")
    fields.finish()
    return take_function(function, {"type": "function", "function": dict(function.values)})


def take_function(
    fields: BodyFields,
    given: Mapping[str, Any] | None = None,
    schema: str = "parameters",
    unsupported: Mapping[str, Parameter] = NOTHING,
) -> Tool:
    """Take the name, the description and the schema of a tool; `given` is what templates see."""
    name, where = fields.required("name"), fields.param("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        expected = "1 to 64 letters, digits, underscores and dashes"
        raise refused(where, f"{where} is {shown(name)}, expected {expected}.")
    description = fields.value("description")
    if description is not None:
        checked_text(description, fields.param("description"), 1 << 20)
    parameters = fields.value(schema)
    strict = fields.flag("strict")
    fields.finish(unsupported)
    return Tool(
        name,
        str(description or ""),
        _parameters(parameters, fields.param(schema)),
        strict,
        given,
    )


def _parameters(value: object, where: str) -> Mapping[str, Any] | None:
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise refused(where, f"{where} is {shown(value)}, expected a JSON schema.")
    kind = value.get("type", "object")
    if kind != "object":
        message = f"{where}.type is {shown(kind)}, expected 'object': arguments have names."
        raise refused(f"{where}.type", message)
    return {"type": "object", **value}


def take_choice(fields: BodyFields) -> Choice:
    """Take the field `tool_choice`, in OpenAI's shape."""
    value, where = fields.value("tool_choice"), fields.param("tool_choice")
    match value:
        case None | "auto":
            return Choice()
        case "none":
            return Choice(None)
        case "required":
            return Choice("required")
        case {"type": "function", "function": {"name": str(name)}}:
            return Choice("required", [name])
        case {"type": "function", "name": str(name)}:  # as /v1/responses has it
            return Choice("required", [name])
        case {"type": "allowed_tools", "allowed_tools": allowed}:
            return _allowed(allowed, where)
        case {"type": "allowed_tools"}:  # as /v1/responses has it
            return _allowed(value, where)
    raise refused(
        where,
        f"{where} is {shown(value)}, expected 'none', 'auto', 'required', or an object that names "
        "a tool: {'type': 'function', 'function': {'name': ...}}.",
    )


def _allowed(value: object, where: str) -> Choice:
    match value:
        case {"mode": "auto" | "required" as mode, "tools": list(tools)}:
            names = [_allowed_name(tool) for tool in tools]
            if names and None not in names:
                return Choice(mode, [str(name) for name in names])
    raise refused(where, f"{where} expects a mode, auto or required, and tools by their names.")


def _allowed_name(tool: object) -> str | None:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
        case {"type": "function", "name": str(name)}:
            return name
    return None


def take_thinking(fields: BodyFields, service: Service) -> Mapping[str, Any]:
    """Take how much is to be reasoned, as a template is told that whose model does."""
    value, where = fields.peek("reasoning_effort"), fields.param("reasoning_effort")
    if value is None or not can_reason(service):
        return {}  # what asks for nothing is taken as such, the rest refused
    fields.value("reasoning_effort")
    if value not in EFFORTS:
        raise refused(where, f"{where} is {shown(value)}, expected one of {', '.join(EFFORTS)}.")
    return {"reasoning_effort": value, "enable_thinking": value != "none"}


def can_reason(service: Service) -> bool:
    """Whether the template knows of reasoning, so that there may be some in a reply."""
    return service.template is not None and reasoning_of(service.template.source, "") is not None


def take_variables(fields: BodyFields) -> Mapping[str, Any]:
    """Take what a template is given beside messages and tools."""
    found, where = fields.pairs("chat_template_kwargs", _MOST_VARIABLES), "chat_template_kwargs"
    for name in found:
        if not name.isidentifier() or name in _GIVEN or name.startswith("_"):
            expected = f"names of variables other than {', '.join(_GIVEN)}"
            raise refused(where, f"{where} has {shown(name)}, expected {expected}.")
    return found


def is_begun(message: Message) -> bool:
    """Whether a message is the beginning of a reply, which then goes on inside it."""
    words = bool(message.get("content")) and not message.get("tool_calls")
    return message["role"] == "assistant" and words


def take_continued(fields: BodyFields, messages: Sequence[Message]) -> bool:
    """Take whether the last message is gone on with, in vLLM's words.

    Unsaid, one of the assistant is, as in the pipelines of transformers and in llama.cpp.
    Raises `ApiError` where both words say the same, or several replies are begun.
    """
    said = [name for name in (_CONTINUING, _ANSWERED) if fields.peek(name) is not None]
    taken = {name: fields.flag(name) for name in (_CONTINUING, _ANSWERED)}
    given = {name: taken[name] for name in said}
    begun = is_begun(messages[-1])
    usual = not given[_ANSWERED] if _ANSWERED in given else begun
    continued = given.get(_CONTINUING, usual)
    if given.get(_ANSWERED) == continued:
        where = fields.param(_ANSWERED)
        raise refused(
            where,
            f"{_CONTINUING} and {where} are both {json.dumps(continued)}: the last "
            "message is either gone on with or answered. Leave one of the two out.",
        )
    if continued and begun and len(messages) > 1 and is_begun(messages[-2]):
        raise refused(
            fields.param("messages"),
            "the last two messages are the assistant's, and the reply goes on inside the last. "
            f"Join them, or ask for an answer to them with {_CONTINUING} false.",
        )
    return continued


class Chat(NamedTuple):
    """A conversation that is to go on."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()  # that the model is told of
    continued: bool = False  # inside the last message
    answered: bool = True  # the prompt ends where an answer begins, if it is not gone on with
    variables: Mapping[str, Any] = {}  # what else the template gets
    reasons: bool = True  # reasoning is told apart from the answer

    def prompt(self, service: Service, param: str = "messages") -> str:
        """Return the text that the template makes. Raises `ApiError`."""
        template = template_of(service)
        try:
            messages, tools = with_tools(template, self.messages, self.tools)
            variables = {**_usual_thinking(service), **self.variables}
            text = template.render(
                messages,
                tools=tools,
                add_generation_prompt=self.answered and not self.continued,
                continue_final_message=self.continued,
                **variables,
            )
        except RequestError as error:
            raise refused(param, str(error)) from error
        thinks = variables.get("enable_thinking", True)
        return text if thinks or self.continued else closed(template.source, text)


def _usual_thinking(service: Service) -> Mapping[str, Any]:
    """Return what a template is told of reasoning where a request says nothing."""
    usual = service.settings.reasoning
    return {} if usual == "auto" or not can_reason(service) else {"enable_thinking": usual == "on"}


def template_of(service: Service) -> ChatTemplate:
    """Return what makes prompts of chats. Raises `ApiError` where nothing does."""
    if service.template is None:
        raise ApiError(
            400,
            f"The model '{service.settings.model_id}' has no chat template, so it cannot chat. "
            "Use /v1/completions, or start the server with --chat-template FILE.",
            code="no_chat_template",
        )
    return service.template


def writes_several(service: Service) -> bool:
    """Whether a reply may have several calls where its request does not say.

    A template that says nothing of tools is of a model that was not taught to call: a small one
    repeats its call for as long as it may.
    """
    return service.template is None or template_format(service.template).describes


def take_parallel(fields: BodyFields, service: Service) -> bool:
    """Take whether a reply may have several calls, as OpenAI has it."""
    return fields.flag("parallel_tool_calls", default=writes_several(service))


def tool_use(
    tools: Sequence[Tool],
    choice: Choice,
    service: Service,
    *,
    parallel: bool = True,
    answer: Mapping[str, Any] | None = None,
    where: str = "tool_choice",
) -> ToolUse | None:
    """Return what a reply may hold of calls; None where it may hold none."""
    if not tools:
        if choice.need == "required" or choice.names:
            raise refused(where, f"{where} asks for a tool, and there are no tools. Give tools.")
        return None
    names = [tool.name for tool in tools]
    for name in choice.names or ():
        if name not in names:
            there = ", ".join(names)
            raise refused(where, f"{where} names {shown(name)}, which is none of tools: {there}.")
    if choice.need is None:
        return None
    offered = [tool for tool in tools if choice.names is None or tool.name in choice.names]
    return ToolUse(
        format=template_format(template_of(service)),
        tools=tuple(offered),
        need=choice.need,
        parallel=parallel and not (choice.need == "required" and len(choice.names or ()) == 1),
        answer=answer,
    )
