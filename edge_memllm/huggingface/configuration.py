"""What transformers wants to know of a model, read from an artifact's manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from edge_memllm.manifest import Manifest, ModelSpec
from edge_memllm.modeling.cache_argument import CACHE


class EdgeMemLLMConfig(PreTrainedConfig):
    """Shape of an exported model, under Hugging Face's names. The manifest is its only source."""

    model_type = "edge_memllm_artifact"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE]

    @classmethod
    def from_manifest(cls, model: ModelSpec, folder: Path) -> EdgeMemLLMConfig:
        """Make the configuration of the artifact in `folder`, which a tokenizer is loaded from."""
        config = cls(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            max_position_embeddings=model.max_position_embeddings,
            beta=model.beta,
            identity=model.identity,
            **_special_tokens(model),
        )
        config.name_or_path = str(folder)
        return config


def generation_config(manifest: Manifest, folder: Path) -> GenerationConfig:
    """Return the defaults of `generate`: the artifact's `generation_config.json`, if it has one.

    Tokens that begin and end a text are the manifest's. The file was checked when it was loaded.
    """
    settings: dict[str, Any] = {}
    if GENERATION_CONFIG_NAME in manifest.files:
        settings = json.loads((folder / GENERATION_CONFIG_NAME).read_bytes())
    return GenerationConfig.from_dict(settings | _special_tokens(manifest.model))


def _special_tokens(model: ModelSpec) -> dict[str, Any]:
    ends = list(model.eos_token_ids)
    return {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
