"""What people call codecs, besides their ids: a word stands for the group that suits most."""

from __future__ import annotations

import re

from edge_memllm.codecs import codec_ids, get_codec
from edge_memllm.errors import ArtifactError

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


def codec_id(word: str, width: int) -> str:
    """Return the codec id that a word or an id stands for, for rows of `width` values.

    Raises `ValueError` that lists what there is.
    """
    found = _LOW_RANK.fullmatch(word)
    if found is not None and 1 <= int(found[1]) <= 100:
        rank = round(width * int(found[1]) / 100 / _MULTIPLE) * _MULTIPLE
        rank = min(max(rank, _MULTIPLE), width)
        return f"lowrank-r{rank}-{_INNER[found[2]]}"
    named = CODEC_WORDS.get(word, word)
    try:
        return get_codec(named).id
    except ArtifactError:
        known = ", ".join(dict.fromkeys([*CODEC_WORDS, LOW_RANK, *codec_ids()]))
        raise ValueError(f"table codec {word!r}, expected one of {known}.") from None
