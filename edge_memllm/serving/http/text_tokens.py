"""The endpoints about the tokenizer: `/tokenize`, `/detokenize` and `/tokenizer_info`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_memllm.request import check_tokens, start_token
from edge_memllm.serving.http.api_error import blaming
from edge_memllm.serving.http.body import Body, parsed, received
from edge_memllm.serving.http.fields import BodyFields, checked_text
from edge_memllm.serving.http.service import Service

Json = dict[str, Any]


class TextTokens:
    """Answers with the model's tokenizer, in vLLM's words; no engine work."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`."""
        return await self._answer(request, self._tokenize)

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`."""
        return await self._answer(request, self._detokenize)

    async def information(self, _: Request) -> Response:
        """`GET /tokenizer_info`."""
        service, spell = self._service, self._service.model.tokenizer.spelling
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

    async def _answer(self, request: Request, work: Callable[[BodyFields], Json]) -> Response:
        service = self._service
        async with received(request, service.settings.limits, service.long_bodies) as body:
            return await service.lane(body).run(self._done, body, work)

    def _done(self, body: Body, work: Callable[[BodyFields], Json]) -> Response:
        return JSONResponse(work(BodyFields(parsed(body, self._service.settings.limits))))

    def _tokenize(self, fields: BodyFields) -> Json:
        self._service.check_model(fields)
        most = self._service.settings.limits.text_characters
        text = checked_text(fields.required("prompt"), "prompt", most)
        special = fields.flag("add_special_tokens", default=True)
        fields.finish()
        ids = self._service.model.tokenizer.encode(text, special=special)
        context = self._service.spec.max_position_embeddings
        return {"count": len(ids), "max_model_len": context, "tokens": ids}

    def _detokenize(self, fields: BodyFields) -> Json:
        self._service.check_model(fields)
        most = self._service.settings.limits.text_tokens
        given = fields.optional_items("tokens", most)
        if given is None:
            fields.required("tokens")
        fields.finish()
        with blaming("tokens"):
            ids = check_tokens(given or (), self._service.spec.vocab_size)
        return {"prompt": self._service.model.tokenizer.decode(ids)}
