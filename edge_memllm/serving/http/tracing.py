"""What a reply that is traced tells of each token: its record, and where that came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.serving.engine import Engine
from edge_memllm.serving.pieces import RecordUse
from edge_memllm.statistics import process_memory


def trace_of(
    tokens: Sequence[int], records: Sequence[RecordUse], texts: TokenTexts, engine: Engine
) -> dict[str, Any]:
    """Return new tokens, the records of those fed to make them, and the memory of the server now.

    In a stream, tokens and records of the parts, put together, are those of the whole.
    """
    memory = process_memory()
    return {
        "tokens": list(tokens),
        "records": [{**asdict(each), "text": texts.text(each.token)} for each in records],
        "memory": {
            "anon_bytes": memory.anon_bytes,
            "file_bytes": memory.file_bytes,
            "kv_bytes": engine.statistics.kv_bytes,
        },
    }
