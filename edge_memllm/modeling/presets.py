"""Named shapes: the paper's three sizes (Table 5, errata mended) and small ones of our own.

Table 5 prints the widths of the two outer Flex rows of the 1B block in each other's place; they
are swapped back here, so that FFN-M shrinks as beta grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_memllm.modeling.configuration import DENSE_BETA, MemoryLLMConfig, memory_width


@dataclass(frozen=True)
class Preset:
    """One size of the family. ``memory_widths`` maps beta to the width the paper prints."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    memory_widths: dict[int, int]


_LLAMA3_VOCABULARY = 128_256

PRESETS: dict[str, Preset] = {
    "micro": Preset(128, 6, 4, 4096, 512, True, {}),
    "tiny": Preset(256, 6, 4, 8192, 512, True, {}),
    "small": Preset(512, 8, 8, 16384, 1024, True, {}),
    "250m": Preset(
        960, 24, 16, _LLAMA3_VOCABULARY, 2048, False, {0: 2560, 1: 2240, 2: 1920, 3: 1600}
    ),
    "750m": Preset(
        1600, 24, 16, _LLAMA3_VOCABULARY, 2048, False, {0: 4272, 1: 3738, 2: 3200, 3: 2668}
    ),
    "1b": Preset(
        2048, 24, 32, _LLAMA3_VOCABULARY, 2048, False, {0: 5464, 1: 4778, 2: 4096, 3: 3418}
    ),
}


def preset_config(name: str, beta: int = 0, **overrides: Any) -> MemoryLLMConfig:
    """The configuration of a preset at a given beta; keyword arguments replace its fields."""
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; use one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    fields: dict[str, Any] = {
        "hidden_size": preset.hidden_size,
        "num_hidden_layers": preset.num_hidden_layers,
        "num_attention_heads": preset.num_attention_heads,
        "vocab_size": preset.vocab_size,
        "max_position_embeddings": preset.max_position_embeddings,
        "tie_word_embeddings": preset.tie_word_embeddings,
        "beta": beta,
        "memory_intermediate_size": preset.memory_widths.get(
            beta, memory_width(preset.hidden_size, beta)
        ),
    }
    if beta == DENSE_BETA and preset.memory_widths:
        fields["intermediate_size"] = preset.memory_widths[0]
    return MemoryLLMConfig(**{**fields, **overrides})


def parameter_counts(config: MemoryLLMConfig) -> dict[str, int]:
    """Parameters of the matrices in the layers, as the paper counts them (section 2.2).

    ``active`` is attention and FFN-C, ``memory`` FFN-M and rows that are parameters, ``total``
    their sum; embedding, head and norms are left out of all three. ``embedding`` is one copy of
    the embedding.
    """
    width = config.hidden_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    attention = 2 * width * query + 2 * width * key_value
    matrices = 3 if config.compute_form == "swiglu" else min(config.beta, 2)
    compute = matrices * width * config.intermediate_size if config.has_compute else 0
    memory = 3 * width * config.memory_intermediate_size if config.has_memory_network else 0
    memory += config.vocab_size * width if config.has_trained_rows else 0
    layers = config.num_hidden_layers
    active, memory = layers * (attention + compute), config.memory_layers * memory
    return {
        "active": active,
        "memory": memory,
        "total": active + memory,
        "embedding": config.vocab_size * width,
    }
