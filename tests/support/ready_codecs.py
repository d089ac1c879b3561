"""Codecs ready for use: those that share parameters have learned them from some random rows."""

from __future__ import annotations

from functools import cache

import numpy as np

from edge_memllm.artifact.layout import RecordLayout
from edge_memllm.artifact.sections import MixedLayout
from edge_memllm.codecs import Codec, codec_ids, get_codec
from edge_memllm.codecs.layered import Allocation

LOW_RANK = ("lowrank-r64-f16", "lowrank-r128-int8-g32", "lowrank-r32-int4-g32")
IDS = (*codec_ids(), *LOW_RANK)
WITH_ROWS = tuple(each for each in IDS if each != "none")
FOR_EMBEDDINGS = tuple(
    each for each in WITH_ROWS if not each.startswith(("nested8", "codebook", "lowrank"))
)


# Two layers; the group of the wire form is 32.
MIXED = (
    ("int8-g64", "codebook4-g32"),
    ("codebook3-g64", "int4-g128"),
    ("int5-g64", "int5-g64"),
    ("codebook2-g128", "codebook2-g128"),
    ("int6-g128", "int2-g32"),
    ("int3-g32", "int8-g128"),
)


def mixed(
    vocab_size: int,
    classes: tuple[tuple[str, ...], ...] = MIXED,
    width: int = 64,
    embedding_dtype: str = "float16",
    embedding_codec: str | None = None,
) -> MixedLayout:
    """A mixed layout with tokens of every class, in no order; its levels are not learned yet."""
    class_of = np.random.default_rng(3).integers(0, len(classes), vocab_size, dtype=np.uint8)
    class_of[: len(classes)] = np.arange(len(classes))[::-1]
    exact = get_codec("f32")
    like = RecordLayout(
        len(classes[0]), width, exact, embedding_dtype, embedding_codec=embedding_codec
    )
    return MixedLayout.of(like, Allocation(classes, class_of))


@cache
def ready_mixed(width: int, embedding_dtype: str = "float16") -> MixedLayout:
    """A mixed layout with its levels, for 600 tokens."""
    layout = mixed(600, width=width, embedding_dtype=embedding_dtype)
    fit = layout.fit()
    fit.add(np.random.default_rng(5).standard_normal((600, 2, width)).astype(np.float32))
    return layout.with_parameters(fit.parameters())


@cache
def ready(codec_id: str, layers: int, width: int) -> Codec:
    """The codec, with parameters for rows [N, layers, width] if it has some."""
    codec = get_codec(codec_id)
    if not codec.parameters_bytes(layers, width):
        return codec
    fit = codec.fit(layers, width)
    random = np.random.default_rng(width)
    shared = random.standard_normal((layers, 8, width))  # rows have something in common
    for _ in range(3):
        rows = np.einsum("nk,lkd->nld", random.standard_normal((100, 8)), shared)
        fit.add((rows + random.standard_normal(rows.shape)).astype(np.float32))
    return codec.with_parameters(fit.parameters(), layers, width)
