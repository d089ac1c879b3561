"""Checkpoints on the Hub: what an export reads, in the library's own cache.

An exporter follows the links of that cache: a checkpoint is its user's own choice, and its weights
are safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path

from edge_memllm.hub.failures import explained, import_hub
from edge_memllm.hub.names import HubModel

# The weights, their index and configuration, and all that an export copies. No pickles, no code.
_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def checkpoint_folder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the folder of a checkpoint, downloaded first when `source` names one of the Hub.

    Arguments and errors are those of `edge_memllm.hub.artifact_folder`.
    """
    model = HubModel.wanted(source, revision)
    if model is None:
        return Path(source)
    hub = import_hub()
    with explained(model, "checkpoint"):
        folder = hub.snapshot_download(
            model.repository,
            revision=model.revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=list(_FILES),
        )
    return Path(folder)
