"""A chat asked of a model in this process: messages and tools in, a reply with its calls out.

The template of the model makes the prompt. Knows no HTTP, and nothing of models but their parts.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeAlias

from edge_memllm.engine.generation import FinishReason, Piece
from edge_memllm.engine.grammar import Grammars, MakeConstraint
from edge_memllm.engine.request import AUTO, Prompt, Request
from edge_memllm.engine.response_format import ResponseFormat
from edge_memllm.engine.scores import TokenScore
from edge_memllm.engine.tool_use import ToolUse
from edge_memllm.errors import RequestError
from edge_memllm.options import signature_of
from edge_memllm.statistics import GenerationStatistics
from edge_memllm.text.chat import ChatTemplate
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm.text.tools import Tool, ToolCall
from edge_memllm.text.tools.functions import function_tool
from edge_memllm.text.tools.parsing import ReplyEvent, ReplyText, collected
from edge_memllm.text.tools.prompt import template_format, with_tools

Message: TypeAlias = Mapping[str, Any]
Messages: TypeAlias = str | Message | Sequence[Message]

_Fields = ParamSpec("_Fields")


@dataclass(frozen=True, slots=True)
class Chat:
    """What is asked of a chat: its messages, its tools, and of the text what a `Request` says."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    tool_choice: str
    parallel: bool | None  # several calls in a reply; None: where the template knows of tools
    request: Request  # without a prompt

    def after(self, earlier: Sequence[Message]) -> Chat:
        """Return the same behind messages that came before."""
        return replace(self, messages=(*earlier, *self.messages))


def chatting(
    ask: Callable[Concatenate[Prompt, _Fields], Request],
) -> Callable[Concatenate[Messages, _Fields], Chat]:
    """Return what asks a chat: messages in place of a prompt, tools, and the rest as it was."""

    def asked(messages: Messages, *given: _Fields.args, **named: _Fields.kwargs) -> Chat:
        request = ask((), *given, **named)
        tools, choice = tuple(map(_tool, request.tools)), request.tool_choice
        parallel = request.parallel_tool_calls
        asked = replace(request, tools=(), tool_choice=AUTO, parallel_tool_calls=None)
        return Chat(_messages(messages), tools, choice, parallel, asked)

    first = next(iter(inspect.signature(asked, eval_str=True).parameters.values()))
    rest = list(signature_of(ask).parameters.values())[1:]
    asked.__signature__ = inspect.Signature([first, *rest])  # type: ignore[attr-defined]
    return asked  # type: ignore[return-value]  # messages may be named as well


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A whole answer; `str` of it is what it says.

    Attributes:
        text: What is said, without calls.
        tool_calls: Calls of tools, whose `arguments` are the text of a JSON object.
        finish_reason: "stop", "tool_calls", or "length" where the tokens were used up.
        statistics: What it cost.
        scores: Of each token, where `top` was asked for.
    """

    text: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason | Literal["tool_calls"]
    statistics: GenerationStatistics | None = field(default=None, repr=False)
    scores: tuple[TokenScore, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def message(self) -> dict[str, Any]:
        """The message that it is in the chat that goes on."""
        found: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {"name": each.name, "arguments": each.arguments},
                }
                for number, each in enumerate(self.tool_calls)
            ]
        return found

    def json(self) -> Any:
        """Return the value that the text is as JSON. Raises `RequestError` if it is none."""
        try:
            return json.loads(self.text)
        except ValueError:
            if self.finish_reason == "length":
                raise RequestError(
                    "the reply was cut off at its limit of tokens, so it is no JSON. Give it "
                    "more max_new_tokens, or bound strings and arrays in the schema."
                ) from None
            raise RequestError(
                f"the reply is no JSON: {self.text!r:.60}. Ask with a response_format."
            ) from None


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """What one new token added to what is said; the last piece has the whole `reply`."""

    text: str
    token: int
    reply: ChatReply | None = None
    score: TokenScore | None = None


class Prepared(NamedTuple):
    """A chat as the model gets it."""

    request: Request
    prompt: list[int]  # that of the request
    use: ToolUse | None  # what reads the reply; None without tools


def prepared(chat: Chat, tokenizer: Tokenizer, grammars: Callable[[], Grammars]) -> Prepared:
    """Return the request that a chat is, and what reads its reply.

    Raises `RequestError`, and as `Grammars.constraints` does where there are tools.
    """
    template = tokenizer.chat_template
    if template is None:
        raise RequestError(
            "this model has no chat template, so it cannot chat. Use generate or stream, or "
            "export it with a chat_template."
        )
    use = _tool_use(chat, template)
    told = () if chat.tool_choice == "none" else chat.tools
    messages, shown = with_tools(template, chat.messages, told)
    prompt = tokenizer.encode(template.render(messages, tools=shown), special=False)
    request = replace(chat.request, prompt=prompt)
    if use is None:
        return Prepared(request, prompt, None)
    if request.constraint is not None:
        raise RequestError("tools and constraint are both given. Leave one of the two out.")
    request = replace(
        request,
        constraint=use.constraint(_calls(use, tokenizer, grammars()), tokenizer),
        response_format=None,
        shown_tokens=(*request.shown_tokens, *use.shown_tokens(tokenizer)),
        stop_token_ids=(*request.stop_token_ids, *use.ends(tokenizer)),
    )
    return Prepared(request, prompt, use)


def replied(
    pieces: Generator[Piece, None, None], use: ToolUse | None
) -> Generator[ChatPiece, None, None]:
    """Yield what pieces of a text say, without calls, and the reply with the last of them."""
    parser = None if use is None else use.parser()
    events: list[ReplyEvent] = []
    scores: list[TokenScore] = []
    try:
        for piece in pieces:
            text: list[ReplyEvent] = [ReplyText(piece.text)]
            said = text if parser is None else parser.push(piece.text)
            ended = piece.finish_reason
            if ended is not None and parser is not None:
                said += parser.flush()
            events += said
            if piece.score is not None:
                scores.append(piece.score)
            shown = "".join(each.text for each in said if isinstance(each, ReplyText))
            reply = None
            if ended is not None:
                whole, calls = collected(events)
                reason = "tool_calls" if calls and ended == "stop" else ended
                reply = ChatReply(whole, tuple(calls), reason, piece.statistics, tuple(scores))
            yield ChatPiece(shown, piece.token, reply, piece.score)
    finally:
        pieces.close()


def whole(pieces: Generator[ChatPiece, None, None]) -> ChatReply:
    """Return the reply at the end of pieces."""
    reply = None
    for piece in pieces:
        reply = piece.reply
    assert reply is not None
    return reply


async def awhole(pieces: AsyncGenerator[ChatPiece, None]) -> ChatReply:
    """Return the reply at the end of pieces that come in asyncio."""
    reply = None
    async with aclosing(pieces):
        async for piece in pieces:
            reply = piece.reply
    assert reply is not None
    return reply


def _messages(given: Messages) -> tuple[Message, ...]:
    if isinstance(given, str):
        return ({"role": "user", "content": given},)
    return (given,) if isinstance(given, Mapping) else tuple(given)


def _tool(given: Tool | Mapping[str, Any] | Callable[..., Any]) -> Tool:
    """Return a tool that may be a function, or given as OpenAI has it. Raises `RequestError`."""
    if isinstance(given, Tool):
        return given
    if callable(given):
        return function_tool(given)
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(
            f"a tool is {given!r:.60}, expected a function, a Tool, or an object such as {{'type': "
            "'function', 'function': {'name': ..., 'parameters': ...}}."
        )
    return Tool(
        function["name"],
        str(function.get("description") or ""),
        function.get("parameters") or None,
        function.get("strict") is True,
        given if "function" in given else {"type": "function", "function": dict(given)},
    )


def _tool_use(chat: Chat, template: ChatTemplate) -> ToolUse | None:
    names, choice = [tool.name for tool in chat.tools], chat.tool_choice
    if choice not in ("auto", "none", "required", *names):
        there = ", ".join(names) or "none"
        raise RequestError(
            f"tool_choice is {choice!r:.40}, expected auto, none, required or the name of a tool. "
            f"There are: {there}."
        )
    if not chat.tools or choice == "none":
        if choice == "required":
            raise RequestError("tool_choice is 'required', and there are no tools. Give tools.")
        return None
    form = ResponseFormat.of(chat.request.response_format)
    if form is not None and not form.is_json:
        raise RequestError(
            f"tools and a {form.noun} are both given: beside calls an answer is JSON alone. Leave "
            "one of the two out."
        )
    format = template_format(template)
    several = format.describes if chat.parallel is None else chat.parallel
    return ToolUse(
        format=format,
        tools=tuple(each for each in chat.tools if choice not in names or each.name == choice),
        need="auto" if choice == "auto" else "required",
        parallel=several and choice not in names,
        answer=None if form is None else json.loads(form.schema_text),
    )


def _calls(use: ToolUse, tokenizer: Tokenizer, grammars: Grammars) -> MakeConstraint:
    """Return what holds calls to their schemas, or to any object where that cannot be."""

    def compiled(use: ToolUse) -> MakeConstraint:
        return grammars.constraints(ResponseFormat("grammar", use.grammar(tokenizer)))

    try:
        return compiled(use)
    except RequestError:
        if use.from_the_start:
            raise
        return compiled(use.of_any_arguments())
