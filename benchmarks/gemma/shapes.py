"""The published sizes of Gemma 4 with a table of rows, and a checkpoint's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PER_LAYER = 256  # values of a row for each layer
_WORDS = 262_144


@dataclass(frozen=True)
class Shape:
    """What differs between the sizes; every `period`-th layer sees the whole text."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    shared: int  # last layers that write no keys
    period: int
    wide: bool  # the feed-forward of the shared layers is twice as wide
    words: int = _WORDS
    head: int = 256
    whole_head: int = 512  # of the layers that see the whole text
    per_layer: int = PER_LAYER
    window: int = 512

    @property
    def layer_types(self) -> list[str]:
        """What each layer sees, in transformers' words."""
        whole = (layer % self.period == self.period - 1 for layer in range(self.layers))
        return ["full_attention" if each else "sliding_attention" for each in whole]

    def inner_width(self, layer: int) -> int:
        """The feed-forward width of a layer."""
        doubled = self.wide and layer >= self.layers - self.shared
        return self.inner * 2 if doubled else self.inner


SHAPES = {
    "e2b": Shape(1536, 6144, 35, 8, 1, 20, 5, True),
    "e4b": Shape(2560, 10240, 42, 8, 2, 18, 6, False),
    # For trying the commands: seconds instead of minutes.
    "tiny": Shape(256, 512, 6, 4, 1, 3, 3, True, words=2048, head=64, whole_head=128, per_layer=64),
}
PUBLISHED = ("e2b", "e4b")


def config_of(shape: Shape) -> dict[str, Any]:
    """The config.json of a multimodal checkpoint that has only its text part."""
    text = {
        "model_type": "gemma4_text",
        "vocab_size": shape.words,
        "vocab_size_per_layer_input": shape.words,
        "hidden_size": shape.hidden,
        "hidden_size_per_layer_input": shape.per_layer,
        "intermediate_size": shape.inner,
        "use_double_wide_mlp": shape.wide,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_kv_shared_layers": shape.shared,
        "head_dim": shape.head,
        "global_head_dim": shape.whole_head,
        "sliding_window": shape.window,
        "layer_types": shape.layer_types,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            },
        },
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": text,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
