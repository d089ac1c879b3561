"""Messages with tools, as a chat template is to get them.

A template that speaks of tools gets them as transformers would give them. For any other, the tools
are described in the system's message, and calls and results of a history become plain messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from edge_memllm.errors import RequestError
from edge_memllm.text.chat import ChatTemplate
from edge_memllm.text.tools.formats import Tool, ToolFormat, format_of

Message: TypeAlias = Mapping[str, Any]

_INSTRUCTION = """\
You can call these tools:

{tools}

To call one, answer with {{"name": NAME, "arguments": {{...}}}} and nothing else, a line for each
call. You get the results. Where no tool is of use, answer in words."""


def template_format(template: ChatTemplate) -> ToolFormat:
    """Return the format of tool calls that a template implies; it may have one for tools."""
    return format_of(template.tool_source)


def with_tools(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> tuple[list[Message], list[Mapping[str, Any]] | None]:
    """Return the messages and the tools that a template is to be rendered with.

    Calls of a history may have their arguments as JSON text, as OpenAI has it, and results need
    not name their tool. Raises `RequestError` for arguments that are no object, and results of a
    call that nobody made.
    """
    plain = _with_objects(messages)
    format = template_format(template)
    if format.in_system:
        return _in_system(plain, tools), None
    if format.describes:
        return plain, [tool.as_given() for tool in tools] or None
    plain = list(_without_calls(plain))
    return (_described(plain, tools) if tools else plain), None


def _with_objects(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose calls hold objects, and whose results name their tool."""
    found: list[Message] = []
    names: dict[str, str] = {}
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        calls = message.get("tool_calls")
        if message.get("role") == "tool":
            message = {"name": _name_of(message, names, where), **message}
        elif calls:
            said = message.get("content") or ""  # which templates look at, calls or not
            parsed = _parsed(calls, f"{where}.tool_calls")
            message = {**message, "content": said, "tool_calls": parsed}
            names |= {call.get("id", ""): call["function"]["name"] for call in calls}
        found.append(message)
    return found


def _name_of(message: Message, names: Mapping[str, str], where: str) -> str:
    call = message.get("tool_call_id")
    if call is None or call in names:
        return names.get(call or "", "tool")
    raise RequestError(
        f"{where}.tool_call_id is {call!a:.80}, and no message before it has a call of that id."
    )


def _parsed(calls: Iterable[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for number, call in enumerate(calls):
        function = call["function"]
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, Mapping):
            raise RequestError(
                f"{where}[{number}].function.arguments is no JSON object, expected the text of one."
            )
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


def _without_calls(messages: Iterable[Message]) -> Iterable[Message]:
    """Yield messages of text alone: calls as the model would write them, results as a user's."""
    results: list[str] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(f"Result of {message['name']}: {message.get('content') or ''}")
            continue
        content = message.get("content")
        if results and message.get("role") == "user" and isinstance(content, str):
            results.append(content)  # templates may want roles that alternate
            continue
        if results:
            yield {"role": "user", "content": "\n".join(results)}
            results = []
        calls = message.get("tool_calls")
        if not calls:
            yield {name: value for name, value in message.items() if name != "tool_calls"}
            continue
        said = [text] if (text := message.get("content")) else []
        for call in calls:
            written = {key: call["function"][key] for key in ("name", "arguments")}
            said.append(json.dumps(written, ensure_ascii=False))
        yield {"role": message["role"], "content": "\n".join(said)}
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def _described(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    lines = "\n".join(map(_line, tools))
    told = _INSTRUCTION.format(tools=lines)
    first = messages[0] if messages else {}
    said = first.get("content") or ""
    if first.get("role") in ("system", "developer") and isinstance(said, str):
        return [{**first, "content": f"{said}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _in_system(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Return messages whose first, of the system, holds the tools as JSON text."""
    if not tools:
        return list(messages)
    told = f"[{', '.join(map(_line, tools))}]"
    first = messages[0] if messages else {}
    if first.get("role") == "system":
        return [{**first, "tools": told}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": told}, *messages]


def _line(tool: Tool) -> str:
    told = {"description": tool.description} if tool.description else {}
    line = {"name": tool.name, **told, "parameters": tool.schema}
    return json.dumps(line, ensure_ascii=False)
