"""Configuration of the MemoryLLM family (https://arxiv.org/abs/2602.00398).

One number, ``beta``, spans it: 0 is MemoryLLM, 1 to 3 are Flex-MemoryLLM, 8 is the dense
baseline. Field names are those of Hugging Face's Llama wherever the meaning is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from edge_memllm.artifact.model_spec import MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH
from edge_memllm.checked_values import is_integer, is_number
from edge_memllm.errors import RequestError

OLD, NEW = "past_key_values", "cache"
# The name in the installed version.
CACHE = NEW if NEW in {field.name for field in fields(BaseModelOutputWithPast)} else OLD

C = TypeVar("C")

DENSE_BETA = 8
CHOICES = {
    "memory_norm": ("per_layer", "shared"),
    "memory_source": ("ffn", "table", "both"),
    "memory_sharing": ("per_layer", "all_layers"),
}
# Other readings of the Flex block were measured once (docs/results/paper.md). Files of networks say
# which they are of; this one is left.
FORMER_CHOICES = {"compute_form": "swiglu", "compute_placement": "sequential"}
# Frequencies that do not change with the length of the text: the graph holds them as tables.
ROPE_TYPES = ("default", "linear", "llama3")

# What an artifact may say of a model.
_MOST = {
    "vocab_size": MAX_VOCABULARY,
    "num_hidden_layers": MAX_LAYERS,
    "max_position_embeddings": MAX_POSITIONS,
    **dict.fromkeys(
        ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), MAX_WIDTH
    ),
}
_SWITCHES = ("tie_word_embeddings", "attention_bias", "qk_norm", "mlp_bias")


def one_cache(cache: C | None, past_key_values: C | None) -> C | None:
    """Return what was given under either name. Raises `RequestError` for both."""
    if cache is not None and past_key_values is not None:
        raise RequestError(
            f"{NEW} and {OLD} are two names of one argument, and both are given. Give {CACHE}, as "
            "the installed transformers does."
        )
    return past_key_values if cache is None else cache


def compute_width(hidden_size: int, beta: int) -> int:
    """Width of FFN-C, so that it holds ``beta * hidden_size**2`` parameters.

    A SwiGLU has three matrices, hence ``beta * h / 3``, rounded up.
    """
    return math.ceil(beta * hidden_size / 3)


def memory_width(hidden_size: int, beta: int) -> int:
    """Width of FFN-M: ``(8 - beta) * h / 3``, the rest of the 8 h^2 budget, rounded down."""
    return (DENSE_BETA - beta) * hidden_size // 3


@strict
class MemoryLLMConfig(PreTrainedConfig):
    """Shape of one network of the family.

    ``intermediate_size`` is the width of FFN-C (on the residual stream) and
    ``memory_intermediate_size`` that of FFN-M (on the token embedding); both follow from
    ``beta`` when left out. The paper draws the Flex block but never prints its equation: FFN-C is a
    SwiGLU behind its own norm, after attention.
    ``memory_gain`` multiplies each layer's memory (one number per layer, all ones when None):
    the alpha of the paper's Table 1. ``attention_bias`` gives query, key and value a bias, and
    ``qk_norm`` norms query and key by head: what converted networks bring along.

    Three fields go beyond the paper. ``memory_norm`` "shared" has one norm in front of all FFN-M.
    ``memory_source`` says whether rows are computed by FFN-M ("ffn"), are parameters themselves
    ("table") or the sum of "both". ``memory_sharing`` "all_layers" has one memory for all layers,
    with one norm and a learned gain for each layer; a token's record then holds one row.
    """

    model_type = "edge_memllm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE]

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    beta: int = 0
    intermediate_size: int | None = None
    memory_intermediate_size: int | None = None
    memory_gain: list[float] | None = None
    memory_norm: str = "per_layer"
    memory_source: str = "ffn"
    memory_sharing: str = "per_layer"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    qk_norm: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = compute_width(self.hidden_size, self.beta)
        if self.memory_intermediate_size is None:
            self.memory_intermediate_size = memory_width(self.hidden_size, self.beta)
        if self.rope_parameters is None:
            theta = kwargs.pop("rope_theta", 10_000.0)
            self.rope_parameters = {"rope_type": "default", "rope_theta": theta}
        for name, left in FORMER_CHOICES.items():
            if (found := kwargs.pop(name, left)) != left:
                raise ValueError(f"{name} is {found!r}; {left!r} is the only one that is computed.")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse shapes that no network of the family has (called by the config itself)."""
        self._validate_numbers()
        if not 0 <= self.beta <= DENSE_BETA:
            raise ValueError(f"beta is {self.beta}; the family has 0 (MemoryLLM) to 8 (dense).")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; use one of {', '.join(choices)}."
                )
        self._validate_memory()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.memory_gain is not None and len(self.memory_gain) != self.num_hidden_layers:
            raise ValueError(
                f"memory_gain has {len(self.memory_gain)} numbers for "
                f"{self.num_hidden_layers} layers; give one per layer."
            )
        if self.rope_parameters.get("rope_type", "default") not in ROPE_TYPES:
            raise ValueError(
                f"rope_type is {self.rope_parameters['rope_type']!r}; "
                f"use one of {', '.join(ROPE_TYPES)}."
            )
        if self.hidden_act != "silu" or self.mlp_bias:
            raise ValueError(
                "The family uses SiLU and no biases in its feed-forward networks (paper, Table 3 "
                "and eq. 2.3)."
            )

    def _validate_numbers(self) -> None:
        """Refuse sizes that cannot be counted with, before anything is as large as they say."""
        for name, most in _MOST.items():
            size = getattr(self, name)
            if not is_integer(size) or not 0 < size <= most:
                raise ValueError(f"{name} is {size!r}; expected an integer from 1 to {most}.")
        if odd := [name for name in _SWITCHES if not isinstance(getattr(self, name), bool)]:
            raise ValueError(f"{odd[0]} is {getattr(self, odd[0])!r}; expected true or false.")
        for gain in self.memory_gain or ():
            if not is_number(gain):
                raise ValueError(f"memory_gain has {gain!r}; expected finite numbers.")
        epsilon = self.rms_norm_eps
        if not is_number(epsilon) or epsilon < 0:
            raise ValueError(f"rms_norm_eps is {epsilon!r}; expected a number >= 0.")

    def _validate_memory(self) -> None:
        """Refuse choices about a part that the network does not have."""
        choices = {"memory_norm": self.has_memory_network}
        choices |= dict.fromkeys(("memory_source", "memory_sharing"), self.has_memory)
        for name, applies in choices.items():
            if not applies and getattr(self, name) != CHOICES[name][0]:
                part = "FFN-M" if self.has_memory else "memory"
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but this network has no {part} "
                    f"(beta {self.beta}, memory_source {self.memory_source!r}). Leave it out."
                )

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return float(self.rope_parameters["rope_theta"])

    @property
    def has_memory(self) -> bool:
        """Whether tokens have memory rows (all but the dense baseline)."""
        return self.beta < DENSE_BETA

    @property
    def has_memory_network(self) -> bool:
        """Whether an FFN-M computes the rows, or a part of them."""
        return self.has_memory and self.memory_source != "table"

    @property
    def has_trained_rows(self) -> bool:
        """Whether the rows, or a part of them, are parameters."""
        return self.has_memory and self.memory_source != "ffn"

    @property
    def memory_layers(self) -> int:
        """Memory rows of a token: one per layer, one for all of them, or none."""
        if not self.has_memory:
            return 0
        return 1 if self.memory_sharing == "all_layers" else self.num_hidden_layers

    @property
    def has_compute(self) -> bool:
        """Whether the layers own an FFN-C (all but MemoryLLM, and attention by itself)."""
        return self.beta > 0 and self.intermediate_size > 0


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
    width = overrides.get("hidden_size", preset.hidden_size)
    printed = preset.memory_widths if width == preset.hidden_size else {}
    fields: dict[str, Any] = {
        "hidden_size": preset.hidden_size,
        "num_hidden_layers": preset.num_hidden_layers,
        "num_attention_heads": preset.num_attention_heads,
        "vocab_size": preset.vocab_size,
        "max_position_embeddings": preset.max_position_embeddings,
        "tie_word_embeddings": preset.tie_word_embeddings,
        "beta": beta,
        "memory_intermediate_size": printed.get(beta, memory_width(width, beta)),
    }
    if beta == DENSE_BETA and printed:
        fields["intermediate_size"] = printed[0]
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
    compute = 3 * width * config.intermediate_size if config.has_compute else 0
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
