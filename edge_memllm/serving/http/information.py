"""The endpoints that tell: models, overlays, health and metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_memllm.serving.http.metrics import CONTENT_TYPE
from edge_memllm.serving.http.service import Service
from edge_memllm.statistics import process_memory

_UNAVAILABLE = 503


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
            "identity": service.spec.identity,
            "max_tokens": service.settings.limits.max_tokens,
            "memory_layers": service.spec.memory_layers,
            "record_bytes": service.model.manifest.layout.record_bytes,
            "reader": service.model.reader,
            "device": service.model.device,
            "sampling": asdict(service.model.sampling),
        }
