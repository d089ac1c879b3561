"""The codecs this version knows, by id. To add one: one file, one entry here."""

from __future__ import annotations

import re
from functools import lru_cache

from edge_memllm.codecs.codec import (
    EMBEDDING_DTYPES,
    GROUPS,
    PLAIN_CODECS,
    Codec,
    EmbeddingForm,
    Fit,
    NoneCodec,
    UnencodableRowError,
)
from edge_memllm.codecs.floats import BFloat16Codec, Float8Codec, Float16Codec, Float32Codec
from edge_memllm.codecs.grouped import (
    AsymmetricInt4Codec,
    Int4Codec,
    Int5Codec,
    Int6Codec,
    Int8Codec,
)
from edge_memllm.codecs.layered import layered_codec
from edge_memllm.codecs.levels import CodebookCodec, Int2Codec, Int3Codec, NormalFloat4Codec
from edge_memllm.codecs.lowrank import LowRankCodec
from edge_memllm.codecs.nested8 import Nested8Codec
from edge_memllm.codecs.wire import CodecSizes
from edge_memllm.errors import ArtifactError

__all__ = [
    "EMBEDDING_DTYPES",
    "FAITHFUL",
    "GROUPS",
    "MIXED",
    "PLAIN_CODECS",
    "Codec",
    "CodecSizes",
    "EmbeddingForm",
    "Fit",
    "UnencodableRowError",
    "codec_ids",
    "embedding_form",
    "get_codec",
    "layered_codec",
]

# Whose rows are as good as the network's: any other adds its own error to a new one's.
FAITHFUL = ("f32", "f16", "bf16")
_CODECS: dict[str, Codec] = {
    codec.id: codec
    for codec in (
        Float32Codec(),
        Float16Codec(),
        BFloat16Codec(),
        *(Float8Codec(group) for group in GROUPS),
        *(Int8Codec(group) for group in GROUPS),
        *(Nested8Codec(group) for group in GROUPS),
        *(Int6Codec(group) for group in GROUPS),
        *(Int5Codec(group) for group in GROUPS),
        *(Int4Codec(group) for group in GROUPS),
        *(AsymmetricInt4Codec(group) for group in GROUPS),
        *(NormalFloat4Codec(group) for group in GROUPS),
        *(Int3Codec(group) for group in GROUPS),
        *(Int2Codec(group) for group in GROUPS),
        *(CodebookCodec(bits, group) for bits in (4, 3, 2) for group in GROUPS),
        NoneCodec(),
    )
}
MIXED = tuple(f"mixed-g{group}" for group in GROUPS)  # tables in sections; no codec of their own
_LOWRANK = re.compile(r"lowrank-r([1-9]\d{0,5})-(.+)")
_LOWRANK_INNER = ("f16", "int8-g32", "int4-g32")

CODEC_WORDS = {
    "f32": "f32",
    "f16": "f16",
    "bf16": "bf16",
    "fp8": "fp8-g64",
    "int8": "int8-g64",
    "nested8": "nested8-g64",
    "int6": "int6-g64",
    "int5": "int5-g64",
    "int4": "int4-g32",
    "int4a": "int4a-g64",
    "nf4": "nf4-g64",
    "codebook4": "codebook4-g64",
    "int3": "int3-g64",
    "codebook3": "codebook3-g32",
    "int2": "int2-g32",
    "codebook2": "codebook2-g32",
}
# Per cent of the width, and how the coefficients are stored.
LOW_RANK = "lowrank-<1 to 100>[-f16|-int8|-int4]"
_LOW_RANK = re.compile(r"lowrank-(\d{1,3})(?:-(f16|int8|int4))?")
_INNER = {None: "int8-g32", "f16": "f16", "int8": "int8-g32", "int4": "int4-g32"}
_MULTIPLE = 32  # ranks fill whole groups


def codec_ids() -> tuple[str, ...]:
    """Return the ids of all codecs that say everything by themselves.

    Left out are `lowrank-r<rank>-<id>`, of which there is one per rank. `mixed-g<group>` is no
    codec: it names tables in sections (`edge_memllm.artifact.sections`).
    """
    return tuple(_CODECS)


def get_codec(codec_id: str) -> Codec:
    """Return the codec with this id. Raises `ArtifactError` for an id this version lacks."""
    codec = _CODECS.get(codec_id) or _low_rank(codec_id)
    if codec is None:
        raise ArtifactError(
            f"Unknown codec '{codec_id}', this version knows {', '.join([*_CODECS, *MIXED])} and "
            f"lowrank-r<rank>-<{'|'.join(_LOWRANK_INNER)}>. Upgrade edge-memllm or export the "
            "model again."
        )
    return codec


def embedding_form(width: int, dtype: str, codec_id: str | None = None) -> EmbeddingForm:
    """Return the form of embeddings in a codec; None stands for the dtype that the graph is fed.

    Raises `ValueError` for what cannot be, codecs that are not for embeddings among it.
    """
    try:
        codec = get_codec(codec_id or PLAIN_CODECS.get(dtype, "f32"))
    except ArtifactError as error:
        raise ValueError(f"embedding: {error}") from None
    if codec.id == "none" or codec.coarse is not None or codec.parameters_bytes(1, width):
        raise ValueError(
            f"embedding codec {codec.id}: expected one that stores values, all of it at once, and "
            "learns nothing from all tokens."
        )
    return EmbeddingForm(width, dtype, codec)


@lru_cache
def _low_rank(codec_id: str) -> Codec | None:
    found = _LOWRANK.fullmatch(codec_id)
    if found is None or found[2] not in _LOWRANK_INNER:
        return None
    return LowRankCodec(int(found[1]), _CODECS[found[2]])


def codec_id(word: str, width: int) -> str:
    """Return the codec id that a word or an id stands for, for rows of `width` values.

    A word's groups are narrower where the width is no multiple of them. Raises `ValueError` that
    lists what there is.
    """
    found = _LOW_RANK.fullmatch(word)
    if found is not None and 1 <= int(found[1]) <= 100:
        rank = round(width * int(found[1]) / 100 / _MULTIPLE) * _MULTIPLE
        rank = min(max(rank, _MULTIPLE), width)
        return f"lowrank-r{rank}-{_INNER[found[2]]}"
    named = CODEC_WORDS.get(word, word)
    if word in CODEC_WORDS and width % _MULTIPLE == 0 and width % (get_codec(named).group or 1):
        named = f"{word}-g{_MULTIPLE}"
    try:
        return get_codec(named).id
    except ArtifactError:
        known = ", ".join(dict.fromkeys([*CODEC_WORDS, LOW_RANK, *codec_ids()]))
        raise ValueError(f"table codec {word!r}, expected one of {known}.") from None
