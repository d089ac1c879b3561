"""MemoryLLM on the edge: attention as a small graph, feed-forward layers read from flash.

Everything public is named in `__all__` and imported when it is first used, so that
`import edge_memllm` itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_memllm.artifact.producer import __version__
    from edge_memllm.engine.chat import ChatPiece, ChatReply
    from edge_memllm.errors import (
        ArtifactError,
        Cancellation,
        CorruptionError,
        EdgeMemLLMError,
        GenerationCancelledError,
        RequestError,
        RuntimeUnavailableError,
        StorageError,
    )
    from edge_memllm.loading import load
    from edge_memllm.model import Model, Piece
    from edge_memllm.sampling import Sampling
    from edge_memllm.session import Session
    from edge_memllm.statistics import GenerationStatistics

__all__ = [
    "ArtifactError",
    "Cancellation",
    "ChatPiece",
    "ChatReply",
    "CorruptionError",
    "EdgeMemLLMError",
    "GenerationCancelledError",
    "GenerationStatistics",
    "Model",
    "Piece",
    "RequestError",
    "RuntimeUnavailableError",
    "Sampling",
    "Session",
    "StorageError",
    "__version__",
    "load",
]

_HOMES = {
    "ArtifactError": "errors",
    "Cancellation": "errors",
    "ChatPiece": "engine.chat",
    "ChatReply": "engine.chat",
    "CorruptionError": "errors",
    "EdgeMemLLMError": "errors",
    "GenerationCancelledError": "errors",
    "GenerationStatistics": "statistics",
    "Model": "model",
    "Piece": "model",
    "RequestError": "errors",
    "RuntimeUnavailableError": "errors",
    "Sampling": "sampling",
    "Session": "session",
    "StorageError": "errors",
    "__version__": "artifact.producer",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_memllm' has no attribute {name!r}")
    value = getattr(import_module(f"edge_memllm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
