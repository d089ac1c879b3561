"""The engine under the name that it had: `edge_memllm.engine` is the place."""

from edge_memllm.engine import (
    ChoiceStatistics,
    Engine,
    EngineStatistics,
    RecordUse,
    Reply,
    ReplyPiece,
    Request,
    TokenScore,
)

__all__ = [
    "ChoiceStatistics",
    "Engine",
    "EngineStatistics",
    "RecordUse",
    "Reply",
    "ReplyPiece",
    "Request",
    "TokenScore",
]
