"""The application: which path is answered by what, and the layers around all of them.

What is answered without the engine is here as well: models, health, metrics, and the files of the
page. What generates is in `replies`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
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

from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.server.calls import read_chat, read_completion
from edge_memllm.server.fields import ApiError, explained
from edge_memllm.server.guard import Guard, Journal
from edge_memllm.server.models import ServedModel, ServedModels
from edge_memllm.server.protocols.llama_form import whole_result
from edge_memllm.server.protocols.llama_reply import LlamaWriter
from edge_memllm.server.protocols.llama_request import read_llama
from edge_memllm.server.protocols.llama_state import LlamaState
from edge_memllm.server.protocols.messages_reply import MessageWriter, error_response
from edge_memllm.server.protocols.messages_request import read_message
from edge_memllm.server.protocols.responses_reply import ResponseWriter
from edge_memllm.server.protocols.responses_request import read_response
from edge_memllm.server.protocols.tokens import TextTokens
from edge_memllm.server.replies import GenerationEndpoint
from edge_memllm.server.reply_format import ChatFormat, ChunkWriter, CompletionFormat
from edge_memllm.server.service import CONTENT_TYPE
from edge_memllm.server.settings import Settings
from edge_memllm.statistics import process_memory

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
_NO_EMBEDDINGS = (
    "This server has no embeddings: its model continues texts, and its vectors are not made to "
    "compare texts by. Ask a server that has a model for embeddings."
)
# What clients look for, and why it is not there.
_NOT_HERE = dict.fromkeys((f"{VERSION}/embeddings", "/embeddings", "/embedding"), _NO_EMBEDDINGS)
_LEFT = 499  # what nobody gets to see, for nobody is there
_ONE_DAY = 24 * 60 * 60


def application(models: ServedModels) -> ASGIApp:
    """Return the ASGI application over the models of a server."""
    routes = [*_routes(models), *(page_routes() if models.state.settings.page else ())]

    async def explain(_: Request, error: Exception) -> Response:
        return explained(error).response()

    async def nothing(_: Request, error: Exception) -> Response:
        return Response(status_code=_LEFT)

    app = Starlette(
        routes=routes,
        middleware=list(_layers(models.state.settings)),
        exception_handlers={
            ApiError: explain,
            EdgeMemLLMError: explain,
            HTTPException: explain,
            ClientDisconnect: nothing,
            Exception: explain,
        },
    )
    app.router.redirect_slashes = False
    return Journal(app, models.state.metrics, [route.path for route in routes])


async def _not_here(why: str, _: Request) -> Response:
    raise ApiError(400, why, code="unsupported_endpoint")


def _layers(settings: Settings) -> Iterator[Middleware]:
    """Yield the layers from the outside; errors of the inner ones can be read across origins."""
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


def _routes(models: ServedModels) -> Iterator[Route]:
    information, tokens = Information(models), TextTokens(models)
    chat = GenerationEndpoint(models, read_chat, partial(ChunkWriter, ChatFormat(), whole_result))
    completions = GenerationEndpoint(
        models, read_completion, partial(ChunkWriter, CompletionFormat(), whole_result)
    )
    responses = GenerationEndpoint(models, read_response, ResponseWriter)
    messages = GenerationEndpoint(models, read_message, MessageWriter, error_response)
    llama = GenerationEndpoint(models, read_llama, LlamaWriter)
    for prefix in (VERSION, ""):
        yield Route(f"{prefix}/completions", completions, methods=["POST"])
        yield Route(f"{prefix}/chat/completions", chat, methods=["POST"])
        yield Route(f"{prefix}/responses", responses, methods=["POST"])
        yield Route(f"{prefix}/messages", messages, methods=["POST"])
        yield Route(f"{prefix}/models", information.models)
        yield Route(f"{prefix}/models/{{model:path}}", information.model)
    yield Route(f"{VERSION}/overlays", information.overlays)
    yield Route("/completion", llama, methods=["POST"])
    yield from LlamaState(models).routes()
    for path, answer in tokens.answers():
        yield Route(path, answer, methods=["POST"])
    yield Route("/tokenizer_info", tokens.information)
    for path, why in _NOT_HERE.items():
        yield Route(path, partial(_not_here, why), methods=["POST"])
    yield Route("/health", information.health)
    yield Route("/metrics", information.metrics)


class Information:
    """Answers from what the server knows; no engine work, and nothing is loaded for it."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    async def models(self, _: Request) -> Response:
        """`GET /v1/models`."""
        data = [
            self._model(name, model)
            for model in self._models.all
            for name in (model.name, *model.aliases)
        ]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        name = request.path_params["model"]
        return JSONResponse(self._model(name, self._models.find(name)))

    async def overlays(self, request: Request) -> Response:
        """`GET /v1/overlays`: those that are loaded, in the order in which they act."""
        model = self._models.find(request.query_params.get("model"))
        names = model.known.get("overlays", ())
        data = [{"id": name, "object": "overlay"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def health(self, _: Request) -> Response:
        """`GET /health`: 200 while requests can be served; how many models are in which state."""
        models = self._models
        if not models.running:
            return JSONResponse({"status": "ended"}, _UNAVAILABLE)
        states = dict(Counter(each.state for each in models.all))
        trouble = models.trouble
        if trouble is not None:
            return JSONResponse({"status": "degraded", "reason": trouble, "models": states})
        return JSONResponse({"status": "ok", "models": states})

    async def metrics(self, _: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        models = self._models
        text = models.state.metrics.text(models.statistics, process_memory(), models.account)
        return Response(text, media_type=CONTENT_TYPE)

    def _model(self, name: str, model: ServedModel) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._models.state.created,
            "owned_by": "edge-memllm",
            "state": model.state,
            "aliases": [model.name, *model.aliases],
            **model.known,
        }


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
