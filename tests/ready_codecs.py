"""Codecs ready for use: those that share parameters have learned them from some random rows."""

from __future__ import annotations

from functools import cache

import numpy as np

from edge_memllm.codecs import Codec, codec_ids, get_codec

LOW_RANK = ("lowrank-r64-f16", "lowrank-r128-int8-g32", "lowrank-r32-int4-g32")
IDS = (*codec_ids(), *LOW_RANK)
WITH_ROWS = tuple(each for each in IDS if each != "none")


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
