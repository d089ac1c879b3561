"""One small network with windows, twice: with rolling caches, and with every position kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_memllm_export import export_model
from edge_memllm_export.architectures.dense import Dense
from edge_memllm_runtimes.kv_cache import ROLLING_SLACK
from support.checkpoints import write_dense

WINDOW, CONTEXT = 24, 400
ROWS = WINDOW + ROLLING_SLACK


def export_rolling(folder: Path, **form: Any) -> tuple[Path, Path]:
    """Export the network into two folders below one, first with rolling caches."""
    checkpoint = write_dense(folder / "dense", "gemma3_text", max_position_embeddings=CONTEXT)
    export_model(checkpoint, folder / "rolling", accept_quality_loss=True, **form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dense, "keeps_window", lambda *_: False)
        export_model(checkpoint, folder / "whole", accept_quality_loss=True, **form)
    return folder / "rolling", folder / "whole"
