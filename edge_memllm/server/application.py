"""The application: which path is answered by what, and the layers around all of them.

What is answered without the engine is here as well: models, health, metrics, the tokenizer, and
the files of the page. What generates is in `replies`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edge_memllm.engine.request import check_tokens, start_token
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.server.calls import read_chat, read_completion
from edge_memllm.server.fields import (
    ApiError,
    Body,
    BodyFields,
    blaming,
    checked_text,
    parsed,
    received,
)
from edge_memllm.server.guard import Guard, Journal
from edge_memllm.server.replies import GenerationEndpoint
from edge_memllm.server.reply_format import ChatFormat, ChunkWriter, CompletionFormat
from edge_memllm.server.service import CONTENT_TYPE, Service
from edge_memllm.statistics import process_memory
from edge_memllm.text.tools.prompt import template_format

_UNAVAILABLE = 503

Json = dict[str, Any]

FOLDER = "edge_memllm.server.page"
INDEX = "index.html"
# What a page may do: load what stands beside it, and ask this server. Nothing inline, no frames.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
}

# Clients are configured with or without it.
VERSION = "/v1"
_LEFT = 499  # what nobody gets to see, for nobody is there
_ONE_DAY = 24 * 60 * 60


def application(service: Service) -> ASGIApp:
    """Return the ASGI application over a service."""
    routes = [*_routes(service), *page_routes()]

    async def explain(_: Request, error: Exception) -> Response:
        return service.explained(error).response()

    async def nothing(_: Request, error: Exception) -> Response:
        return Response(status_code=_LEFT)

    app = Starlette(
        routes=routes,
        middleware=list(_layers(service)),
        exception_handlers={
            ApiError: explain,
            EdgeMemLLMError: explain,
            HTTPException: explain,
            ClientDisconnect: nothing,
            Exception: explain,
        },
    )
    app.router.redirect_slashes = False
    return Journal(app, service.metrics, [route.path for route in routes])


def _layers(service: Service) -> Iterator[Middleware]:
    """Yield the layers from the outside; errors of the inner ones can be read across origins."""
    settings = service.settings
    if settings.origins:
        yield Middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After", "X-Request-Id"),
            max_age=_ONE_DAY,
        )
    yield Middleware(Guard, settings)


def _routes(service: Service) -> Iterator[Route]:
    information, tokens = Information(service), TextTokens(service)
    chat = GenerationEndpoint(service, read_chat, partial(ChunkWriter, ChatFormat()))
    completions = GenerationEndpoint(
        service, read_completion, partial(ChunkWriter, CompletionFormat())
    )
    for prefix in (VERSION, ""):
        yield Route(f"{prefix}/completions", completions, methods=["POST"])
        yield Route(f"{prefix}/chat/completions", chat, methods=["POST"])
        yield Route(f"{prefix}/models", information.models)
        yield Route(f"{prefix}/models/{{model:path}}", information.model)
    yield Route(f"{VERSION}/overlays", information.overlays)
    yield Route("/tokenize", tokens.tokenize, methods=["POST"])
    yield Route("/detokenize", tokens.detokenize, methods=["POST"])
    yield Route("/tokenizer_info", tokens.information)
    yield Route("/health", information.health)
    yield Route("/metrics", information.metrics)


class Information:
    """Answers from what the service knows; no engine work."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, _: Request) -> Response:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        self._service.check_model_id(request.path_params["model"], "model")
        return JSONResponse(self._model())

    async def overlays(self, _: Request) -> Response:
        """`GET /v1/overlays`: those that are loaded, in the order in which they act."""
        names = self._service.model.overlays
        data = [{"id": name, "object": "overlay"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def health(self, _: Request) -> Response:
        """`GET /health`: 200 while requests can be served."""
        service = self._service
        if not service.engine.running:
            return JSONResponse({"status": "ended"}, _UNAVAILABLE)
        trouble = service.trouble
        if trouble is not None:
            return JSONResponse({"status": "degraded", "reason": trouble})
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        text = self._service.metrics.text(self._service.engine.statistics, process_memory())
        return Response(text, media_type=CONTENT_TYPE)

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.settings.model_id,
            "object": "model",
            "created": service.created,
            "owned_by": "edge-memllm",
            "max_model_len": service.spec.max_position_embeddings,
            "chat": service.template is not None,
            "tools": None if service.template is None else template_format(service.template).name,
            "identity": service.spec.identity,
            "max_tokens": service.settings.limits.max_tokens,
            "memory_layers": service.spec.memory.layers,
            "record_bytes": service.model.manifest.layout.record_bytes,
            "reader": service.model.reader,
            "device": service.model.device,
            "sampling": asdict(service.model.sampling),
        }


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


def page_routes(folder: Traversable | None = None) -> Iterator[Route]:
    """Yield a route for each file of the page, and `/` for its index."""
    for file in sorted((folder or files(FOLDER)).iterdir(), key=lambda each: each.name):
        kind = KINDS.get(PurePath(file.name).suffix)
        if kind is None:
            continue
        answer = _PageFile(file.read_bytes(), kind)
        yield Route(f"/page/{file.name}", answer.respond)
        if file.name == INDEX:
            yield Route("/", answer.respond)


class _PageFile:
    """One file; asked again, it is not sent again."""

    def __init__(self, content: bytes, kind: str) -> None:
        self._content = content
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._headers = {
            "Content-Security-Policy": POLICY,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
            "ETag": self._tag,
            "Content-Type": kind,
        }

    async def respond(self, request: Request) -> Response:
        """Send the file, or say that it is still the same."""
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)
