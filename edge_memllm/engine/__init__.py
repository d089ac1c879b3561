"""Many requests on one model: queueing, batching, and keys and values used again. No HTTP.

Light: numpy and the standard library. A server, a desktop program or a test submits requests to
an `Engine` and reads replies, from threads or from asyncio.
"""

from edge_memllm.engine.engine import Engine
from edge_memllm.engine.reply import ChoiceStatistics, RecordUse, Reply, ReplyPiece, TokenScore
from edge_memllm.engine.scheduler import EngineStatistics
from edge_memllm.request import Request

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
