"""The application: which path is answered by what, and the layers around all of them."""

from __future__ import annotations

from collections.abc import Iterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.serving.http.api_error import ApiError
from edge_memllm.serving.http.chat_call import read_chat
from edge_memllm.serving.http.completion_call import read_completion
from edge_memllm.serving.http.generating import Generating
from edge_memllm.serving.http.guard import Guard
from edge_memllm.serving.http.information import Information
from edge_memllm.serving.http.journal import Journal
from edge_memllm.serving.http.page import page_routes
from edge_memllm.serving.http.reply_format import ChatFormat, CompletionFormat
from edge_memllm.serving.http.service import Service
from edge_memllm.serving.http.text_tokens import TextTokens

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
    chat = Generating(service, read_chat, ChatFormat())
    completions = Generating(service, read_completion, CompletionFormat())
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
