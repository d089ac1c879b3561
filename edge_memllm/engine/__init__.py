"""How text comes to be: requests checked, tokens fed and chosen, one text alone or many together.

An `Engine` serves many at once: queueing, batching, keys and values used again; it is submitted to
from threads or from asyncio. Light: numpy and the standard library. No HTTP. Names are imported
when they are used, for the model stands on some of these modules and the engine on the model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_memllm.engine.engine import Engine
    from edge_memllm.engine.reply import (
        ChoiceStatistics,
        PromptProgress,
        RecordUse,
        Reply,
        ReplyPiece,
    )
    from edge_memllm.engine.request import Request
    from edge_memllm.engine.scheduler import EngineStatistics
    from edge_memllm.engine.scores import TokenScore

__all__ = [
    "ChoiceStatistics",
    "Engine",
    "EngineStatistics",
    "PromptProgress",
    "RecordUse",
    "Reply",
    "ReplyPiece",
    "Request",
    "TokenScore",
]

_HOMES = {
    "ChoiceStatistics": "reply",
    "Engine": "engine",
    "EngineStatistics": "scheduler",
    "PromptProgress": "reply",
    "RecordUse": "reply",
    "Reply": "reply",
    "ReplyPiece": "reply",
    "Request": "request",
    "TokenScore": "scores",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
