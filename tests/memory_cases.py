"""The networks that looking into a memory has to be right on: every kind the family has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_memllm.interpretation.network_memory import NetworkMemory

WITH_KEYS: dict[str, dict[str, Any]] = {
    "memoryllm": {},
    **{f"beta {beta}": {"beta": beta} for beta in (1, 2, 3, 7)},
    "linear compute": {"beta": 2, "compute_form": "linear"},
    "parallel compute": {"beta": 3, "compute_placement": "parallel"},
    "shared norm": {"memory_norm": "shared"},
    "one memory": {"memory_sharing": "all_layers", "beta": 1},
    "rows beside FFN-M": {"memory_source": "both"},
    "one memory beside rows": {"memory_sharing": "all_layers", "memory_source": "both"},
    "gains": {"memory_gain": [0.5, -2.0]},
    "tied, grouped, normed": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "attention_bias": True,
    },
}
WITHOUT_KEYS: dict[str, dict[str, Any]] = {
    "table": {"memory_source": "table"},
    "one table": {"memory_source": "table", "memory_sharing": "all_layers", "beta": 2},
}
WITH_MEMORY = {**WITH_KEYS, **WITHOUT_KEYS}


def network_memory(checkpoint: Path) -> NetworkMemory:
    from edge_memllm_export.checkpoint import Checkpoint

    return NetworkMemory(Checkpoint.open(checkpoint).network())
