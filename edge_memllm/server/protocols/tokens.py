"""Prompts and tokens without a reply: what a chat becomes, how many tokens it has, and which.

In the words of vLLM (`/tokenize`), llama.cpp (`/apply-template`), Anthropic and OpenAI.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_memllm.engine.request import check_tokens, start_token
from edge_memllm.server.calls import read_chat
from edge_memllm.server.fields import BodyFields, blaming, checked_text, explained, parsed, received
from edge_memllm.server.messages import (
    Chat,
    take_choice,
    take_continued,
    take_messages,
    take_tools,
    take_variables,
)
from edge_memllm.server.models import ServedModels
from edge_memllm.server.parameters import nothing_of
from edge_memllm.server.protocols.messages_reply import error_response
from edge_memllm.server.protocols.messages_request import read_counted
from edge_memllm.server.protocols.responses_request import read_response
from edge_memllm.server.reply_format import Json
from edge_memllm.server.service import Service

Answer: TypeAlias = Callable[[Request], Awaitable[Response]]
Work: TypeAlias = Callable[[BodyFields, Service], Json]

_CONTENT_UNSUPPORTED = nothing_of("special tokens are always known", parse_special=(True,))


class TextTokens:
    """Answers with the model's tokenizer, in vLLM's words; no engine work."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def answers(self) -> Iterator[tuple[str, Answer]]:
        """Yield each path that takes a body, and what answers it."""
        works = {
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/apply-template": self._apply_template,
            "/v1/responses/input_tokens": self._count_response,
            "/v1/chat/completions/input_tokens": self._count_openai,
            "/chat/completions/input_tokens": self._count_openai,
        }
        for path, work in works.items():
            yield path, partial(self._answer, work)
        yield "/v1/messages/count_tokens", self._count_message

    async def information(self, request: Request) -> Response:
        """`GET /tokenizer_info`; with several models, `?model=NAME` names one."""
        async with AsyncExitStack() as stack:
            model = self._models.find(request.query_params.get("model"))
            return self._information(await self._models.kept(model, stack))

    def _information(self, service: Service) -> Response:
        spell = service.model.tokenizer.spelling
        start, ends = start_token(service.spec), service.spec.eos_token_ids
        template = service.template
        return JSONResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": None if start is None else spell(start),
                "eos_token": spell(ends[0]) if ends else None,
                "model_max_length": service.spec.max_position_embeddings,
                "chat_template": None if template is None else template.source,
            }
        )

    async def _count_message(self, request: Request) -> Response:
        try:
            return await self._answer(self._count_chat, request)
        except Exception as error:
            return error_response(explained(error))

    async def _answer(self, work: Work, request: Request) -> Response:
        state = self._models.state
        limits = state.settings.limits
        async with received(request, limits, state.long_bodies) as body, AsyncExitStack() as stack:
            lane = state.lane(body)
            fields = BodyFields(await lane.run(parsed, body, limits))
            service = await self._models.kept(self._models.asked(fields), stack)
            return await lane.run(lambda: JSONResponse(work(fields, service)))

    def _tokenize(self, fields: BodyFields, service: Service) -> Json:
        if fields.peek("content") is not None:
            return self._tokenize_content(fields, service)
        service.check_model(fields)
        most = service.settings.limits.text_characters
        of_chat = fields.peek("messages") is not None
        if of_chat:
            chat = self._take_chat(fields, service)
            text = checked_text(chat.prompt(service), "messages", most)
        else:
            text = checked_text(fields.required("prompt"), "prompt", most)
        special = fields.flag("add_special_tokens", default=not of_chat)
        fields.finish()
        ids = service.model.tokenizer.encode(text, special=special)
        context = service.spec.max_position_embeddings
        return {"count": len(ids), "max_model_len": context, "tokens": ids}

    def _tokenize_content(self, fields: BodyFields, service: Service) -> Json:
        """Tokenize a text in llama.cpp's words."""
        service.check_model(fields)
        most = service.settings.limits.text_characters
        text = checked_text(fields.required("content"), "content", most)
        special, pieces = fields.flag("add_special"), fields.flag("with_pieces")
        fields.finish(_CONTENT_UNSUPPORTED)
        ids = service.model.tokenizer.encode(text, special=special)
        if not pieces:
            return {"tokens": ids}
        return {"tokens": [{"id": each, "piece": _piece(each, service)} for each in ids]}

    def _apply_template(self, fields: BodyFields, service: Service) -> Json:
        service.check_model(fields)
        chat = self._take_chat(fields, service)
        fields.finish()
        return {"prompt": chat.prompt(service)}

    def _take_chat(self, fields: BodyFields, service: Service) -> Chat:
        limits = service.settings.limits
        messages, tools = take_messages(fields, limits), take_tools(fields, limits)
        choice = take_choice(fields)
        answered = fields.peek("add_generation_prompt") is not False
        if answered or fields.peek("continue_final_message"):
            continued = take_continued(fields, messages)
        else:  # the messages alone: there is no reply to come
            continued = fields.flag("continue_final_message") or fields.flag(
                "add_generation_prompt"
            )
        offered = () if choice.need is None else tools
        return Chat(messages, offered, continued, answered, take_variables(fields))

    def _count_chat(self, fields: BodyFields, service: Service) -> Json:
        text = read_counted(fields, service).prompt(service)
        return {"input_tokens": len(service.model.tokenizer.encode(text, special=False))}

    def _count_openai(self, fields: BodyFields, service: Service) -> Json:
        (prompt,) = read_chat(fields, service).prompts
        return {"object": "response.input_tokens", "input_tokens": len(prompt)}

    def _count_response(self, fields: BodyFields, service: Service) -> Json:
        (prompt,) = read_response(fields, service).prompts
        return {"object": "response.input_tokens", "input_tokens": len(prompt)}

    def _detokenize(self, fields: BodyFields, service: Service) -> Json:
        service.check_model(fields)
        most = service.settings.limits.text_tokens
        given = fields.optional_items("tokens", most)
        if given is None:
            fields.required("tokens")
        fields.finish()
        with blaming("tokens"):
            ids = check_tokens(given or (), service.spec.vocab_size)
        text = service.model.tokenizer.decode(ids)
        return {"prompt": text, "content": text}


def _piece(token: int, service: Service) -> str | list[int]:
    """Return a token's text; its bytes where they are no whole character."""
    texts = service.texts
    return texts.text(token) if texts.has_text(token) else list(texts.utf8(token))
