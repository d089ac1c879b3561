"""What llama.cpp's server tells of itself: `/props` and `/slots`. Nothing is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import edge_memllm
from edge_memllm.engine.request import Request as Asked
from edge_memllm.engine.request import start_token
from edge_memllm.server.models import ServedModel, ServedModels
from edge_memllm.server.protocols.llama_form import generation_settings
from edge_memllm.server.service import Service

Json = dict[str, Any]


class LlamaState:
    """Answers about one model; of several, `?model=NAME` names it."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def routes(self) -> Iterator[Route]:
        """Yield the paths."""
        yield Route("/props", self.props)
        yield Route("/slots", self.slots)

    async def props(self, request: Request) -> Response:
        """`GET /props`: the model, what its requests get by default, and whether it sleeps."""
        model = self._found(request)
        service = model.service
        told: Json = {
            "model_alias": model.name,
            "model_path": model.name,  # where it lies is nobody's affair
            "build_info": f"edge-memllm {edge_memllm.__version__}",
            "modalities": {"vision": False, "audio": False},
            "is_sleeping": service is None,
        }
        return JSONResponse(told if service is None else {**told, **_loaded(service)})

    async def slots(self, request: Request) -> Response:
        """`GET /slots`: the places for texts, and which are in use. Texts are not told."""
        service = self._found(request).service
        return JSONResponse([] if service is None else [*_slots(service)])

    def _found(self, request: Request) -> ServedModel:
        return self._models.find(request.query_params.get("model"))


def _loaded(service: Service) -> Json:
    spell, spec = service.model.tokenizer.spelling, service.spec
    start, ends = start_token(spec), spec.eos_token_ids
    settings = service.settings
    default = Asked(prompt=(), sampling=service.model.sampling, speculate=settings.speculate)
    seed = -1 if settings.seed is None else settings.seed
    return {
        "default_generation_settings": {
            "n_ctx": spec.max_position_embeddings,
            "params": {"seed": seed, **generation_settings(default, service), "n_predict": -1},
        },
        "total_slots": service.engine.statistics.slots,
        "chat_template": "" if service.template is None else service.template.source,
        "bos_token": "" if start is None else spell(start),
        "eos_token": spell(ends[0]) if ends else "",
    }


def _slots(service: Service) -> Iterator[Json]:
    """Yield each place. Texts are moved from one to the other: how many are busy is what counts."""
    statistics = service.engine.statistics
    for number in range(statistics.slots):
        yield {
            "id": number,
            "n_ctx": service.spec.max_position_embeddings,
            "speculative": bool(service.settings.speculate),
            "is_processing": number < statistics.under_way,
        }
