"""The codecs this version knows, by id. To add one: one file, one entry here."""

from __future__ import annotations

import re
from functools import lru_cache

from edge_memllm.codecs.bf16 import BFloat16Codec
from edge_memllm.codecs.codebook import CodebookCodec
from edge_memllm.codecs.codec import Codec, CodecSizes, Fit, UnencodableRowError
from edge_memllm.codecs.f16 import Float16Codec
from edge_memllm.codecs.f32 import Float32Codec
from edge_memllm.codecs.fp8 import Float8Codec
from edge_memllm.codecs.int2 import Int2Codec
from edge_memllm.codecs.int3 import Int3Codec
from edge_memllm.codecs.int4 import Int4Codec
from edge_memllm.codecs.int4a import AsymmetricInt4Codec
from edge_memllm.codecs.int5 import Int5Codec
from edge_memllm.codecs.int6 import Int6Codec
from edge_memllm.codecs.int8 import Int8Codec
from edge_memllm.codecs.lowrank import LowRankCodec
from edge_memllm.codecs.mixed import MixedCodec
from edge_memllm.codecs.nested8 import Nested8Codec
from edge_memllm.codecs.nf4 import NormalFloat4Codec
from edge_memllm.codecs.none import NoneCodec
from edge_memllm.errors import ArtifactError

__all__ = ["Codec", "CodecSizes", "Fit", "UnencodableRowError", "codec_ids", "get_codec"]

_GROUPS = (32, 64, 128)
_CODECS: dict[str, Codec] = {
    codec.id: codec
    for codec in (
        Float32Codec(),
        Float16Codec(),
        BFloat16Codec(),
        *(Float8Codec(group) for group in _GROUPS),
        *(Int8Codec(group) for group in _GROUPS),
        *(Nested8Codec(group) for group in _GROUPS),
        *(Int6Codec(group) for group in _GROUPS),
        *(Int5Codec(group) for group in _GROUPS),
        *(Int4Codec(group) for group in _GROUPS),
        *(AsymmetricInt4Codec(group) for group in _GROUPS),
        *(NormalFloat4Codec(group) for group in _GROUPS),
        *(Int3Codec(group) for group in _GROUPS),
        *(Int2Codec(group) for group in _GROUPS),
        *(CodebookCodec(bits, group) for bits in (4, 3, 2) for group in _GROUPS),
        NoneCodec(),
    )
}
_MIXED = {codec.id: codec for codec in map(MixedCodec, _GROUPS)}
_LOWRANK = re.compile(r"lowrank-r([1-9]\d{0,5})-(.+)")
_LOWRANK_INNER = ("f16", "int8-g32", "int4-g32")


def codec_ids() -> tuple[str, ...]:
    """Return the ids of all codecs that say everything by themselves.

    Left out are `lowrank-r<rank>-<id>`, of which there is one per rank, and `mixed-g<group>`,
    which need an allocation.
    """
    return tuple(_CODECS)


def get_codec(codec_id: str) -> Codec:
    """Return the codec with this id. Raises `ArtifactError` for an id this version lacks."""
    codec = _CODECS.get(codec_id) or _MIXED.get(codec_id) or _low_rank(codec_id)
    if codec is None:
        raise ArtifactError(
            f"Unknown codec '{codec_id}', this version knows {', '.join([*_CODECS, *_MIXED])} and "
            f"lowrank-r<rank>-<{'|'.join(_LOWRANK_INNER)}>. Upgrade edge-memllm or export the "
            "model again."
        )
    return codec


@lru_cache
def _low_rank(codec_id: str) -> Codec | None:
    found = _LOWRANK.fullmatch(codec_id)
    if found is None or found[2] not in _LOWRANK_INNER:
        return None
    return LowRankCodec(int(found[1]), _CODECS[found[2]])
