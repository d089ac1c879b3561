"""Floats of 16 and 8 bits that numpy lacks: encoding by ml_dtypes, decoding without it.

What runs an artifact only decodes, so it needs no library for this.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_memllm.codecs.wire import Bytes, Floats
from edge_memllm.errors import missing_extra

E4M3_LARGEST = 448.0


def encode_bfloat16(values: Floats) -> Bytes:
    """Round to bfloat16, ties to even; two bytes each along the last axis."""
    return values.astype(_ml_dtypes().bfloat16).view(np.uint8)


def decode_bfloat16(stored: Bytes) -> Floats:
    """Return the values of bytes along the last axis, two each."""
    wide = stored.view("<u2").astype(np.uint32)
    wide <<= 16  # it is the upper half of a float32
    return wide.view(np.float32)


def encode_e4m3(values: Floats) -> Bytes:
    """Round to e4m3 (the kind with NaN and without infinities), ties to even; a byte each."""
    return values.astype(_ml_dtypes().float8_e4m3fn).view(np.uint8)


def e4m3_values() -> Floats:
    """Return what all 256 bytes stand for: sign, four bits of exponent, three of fraction."""
    magnitudes = np.arange(128)
    exponents, fractions = magnitudes >> 3, magnitudes & 7
    values = np.where(
        exponents > 0,
        np.ldexp(8 + fractions, exponents - 10),
        np.ldexp(fractions, -9),  # subnormal
    )
    values[127] = np.nan
    both: Floats = np.concatenate([values, -values]).astype(np.float32)
    return both


def _ml_dtypes() -> Any:
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise missing_extra("ml_dtypes", "export") from error
    return ml_dtypes
