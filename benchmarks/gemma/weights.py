"""Random weights of a size at which every part of the network matters, a few rows at a time.

Names and shapes are those of transformers' Gemma 4; values depend on the seed, the name and the
row alone, so that a folder and a GGUF file of one seed hold the same network, and neither is ever
in memory. Norms vary by channel, keys are of such a length that attention is neither flat nor a
single position, and the rows of the table are about as large as what is projected beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.gemma.shapes import Shape

if TYPE_CHECKING:
    import torch

TABLE = "embed_tokens_per_layer.weight"
EMBEDDING = "embed_tokens.weight"
_CHUNK_VALUES = 1 << 24
_TABLE_SCALE = 0.06  # times sqrt(256), which the network does


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name without the checkpoint's prefix -> shape, in the order of the checkpoint."""
    D, P, L = shape.hidden, shape.per_layer, shape.layers
    found: dict[str, tuple[int, ...]] = {
        EMBEDDING: (shape.words, D),
        TABLE: (shape.words, L * P),
        "per_layer_model_projection.weight": (L * P, D),
        "per_layer_projection_norm.weight": (P,),
        "norm.weight": (D,),
    }
    for layer, kind in enumerate(shape.layer_types):
        own = {
            **_attention(shape, kind == "full_attention", layer < L - shape.shared),
            **_feed_forward(D, shape.inner_width(layer)),
            "per_layer_input_gate.weight": (P, D),
            "per_layer_projection.weight": (D, P),
            "post_per_layer_input_norm.weight": (D,),
            "layer_scalar": (1,),
        }
        found |= {f"layers.{layer}.{name}": size for name, size in own.items()}
    return found


def _attention(shape: Shape, whole: bool, own_keys: bool) -> dict[str, tuple[int, ...]]:
    head = shape.whole_head if whole else shape.head
    queries, keys, D = shape.heads * head, shape.kv_heads * head, shape.hidden
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (queries, D),
        "self_attn.q_norm.weight": (head,),
        "self_attn.o_proj.weight": (D, queries),
        "post_attention_layernorm.weight": (D,),
    }
    if own_keys:
        found |= {
            "self_attn.k_proj.weight": (keys, D),
            "self_attn.v_proj.weight": (keys, D),
            "self_attn.k_norm.weight": (head,),
        }
    return found


def _feed_forward(hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        "pre_feedforward_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "post_feedforward_layernorm.weight": (hidden,),
    }


def chunks(name: str, size: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Yield the rows of a tensor in bfloat16, so many at a time that they are about 32 MB."""
    rows = max(1, _CHUNK_VALUES // max(1, _product(size[1:])))
    for first in range(0, size[0], rows):
        yield _values(name, (min(rows, size[0] - first), *size[1:]), f"{seed}/{name}/{first}")


def _values(name: str, size: tuple[int, ...], key: str) -> torch.Tensor:
    import torch

    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    generator: Any = torch.Generator().manual_seed(number)
    if name.endswith("layer_scalar"):
        found = torch.rand(size, generator=generator).mul_(0.8).add_(0.3)
    elif len(size) == 1:
        found = torch.rand(size, generator=generator).add_(0.5)
        if name.endswith("k_norm.weight"):
            found.mul_(size[0] ** -0.5)
    else:
        scale = _TABLE_SCALE if name == TABLE else size[-1] ** -0.5
        found = torch.randn(size, generator=generator).mul_(scale)
    return found.to(torch.bfloat16)


def _product(sizes: tuple[int, ...]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found
