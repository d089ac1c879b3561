"""Prompts and settings that the tests of `edge_memllm.huggingface` share."""

from __future__ import annotations

import torch
from conftest import PAD

EXACT = {"graph_weights": "fp32", "table_codec": "f32"}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
TEXT = "A token becomes a row. "


def ids(*rows: str) -> torch.Tensor:
    return torch.tensor([list(row.encode()) for row in rows])


def padded(*rows: str) -> dict[str, torch.Tensor]:
    """Rows of bytes, padded on the left."""
    width = max(map(len, rows))
    tokens = [[PAD] * (width - len(row)) + list(row.encode()) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
