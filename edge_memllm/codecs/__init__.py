"""The codecs this version knows, by id. To add one: one file, one entry here."""

from __future__ import annotations

from edge_memllm.codecs.codec import Codec, CodecSizes, UnencodableRowError
from edge_memllm.codecs.f16 import Float16Codec
from edge_memllm.codecs.f32 import Float32Codec
from edge_memllm.codecs.int4 import Int4Codec
from edge_memllm.codecs.int8 import Int8Codec
from edge_memllm.codecs.none import NoneCodec
from edge_memllm.errors import ArtifactError

__all__ = ["Codec", "CodecSizes", "UnencodableRowError", "codec_ids", "get_codec"]

_CODECS: dict[str, Codec] = {
    codec.id: codec
    for codec in (
        Float32Codec(),
        Float16Codec(),
        Int8Codec(32),
        Int8Codec(64),
        Int8Codec(128),
        Int4Codec(32),
        Int4Codec(64),
        NoneCodec(),
    )
}


def codec_ids() -> tuple[str, ...]:
    """Return the ids of all codecs."""
    return tuple(_CODECS)


def get_codec(codec_id: str) -> Codec:
    """Return the codec with this id. Raises `ArtifactError` for an id this version lacks."""
    try:
        return _CODECS[codec_id]
    except KeyError:
        raise ArtifactError(
            f"Unknown codec '{codec_id}', this version knows {', '.join(_CODECS)}. "
            "Upgrade edge-memllm or export the model again."
        ) from None
