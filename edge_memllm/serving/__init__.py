"""Many requests on one model: queueing, batching, and keys and values used again. No HTTP.

Light: numpy and the standard library. A server, a desktop program or a test submits requests to
an `Engine` and reads replies, from threads or from asyncio.
"""

from edge_memllm.serving.channel import Reply
from edge_memllm.serving.engine import Engine
from edge_memllm.serving.pieces import ChoiceStatistics, RecordUse, ReplyPiece, TokenScore
from edge_memllm.serving.request import Request
from edge_memllm.serving.tally import EngineStatistics

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
