"""Floats of 32, 16 and 8 bits. f32 has every value exactly as the network computed it."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.codecs.codec import Codec
from edge_memllm.codecs.grouped import SMALLEST_SCALE, extremes, in_steps, round_away_from_zero
from edge_memllm.codecs.wire import CodecSizes, Wire, wire_sizes
from edge_memllm.errors import missing_extra

E4M3_LARGEST = 448.0


class Float32Codec(Codec):
    """Values as float32, exact."""

    id = "f32"
    wire: Wire = "f32"
    limit = float(np.finfo(np.float32).max)

    def bound(self, rows: Floats) -> Floats:
        """Return zero: this codec is exact."""
        return np.zeros_like(rows)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        codes = rows.astype("<f4").view(np.uint8).reshape(len(rows), -1)
        return np.empty((len(rows), 0), np.uint8), codes


class Float16Codec(Codec):
    """Values rounded to float16; the graph is fed them as they are."""

    id = "f16"
    wire: Wire = "f16"
    limit = 65504.0

    def bound(self, rows: Floats) -> Floats:
        """Return half a unit in the last place: abs(x) * 2^-11, or 2^-25 for subnormals."""
        return np.maximum(np.abs(rows) * np.float32(2.0**-11), np.float32(2.0**-25))

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        codes = rows.astype("<f2").view(np.uint8).reshape(len(rows), -1)
        return np.empty((len(rows), 0), np.uint8), codes


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


class BFloat16Codec(Codec):
    """Values rounded to bfloat16; the graph is fed them as float16, so they must fit in that."""

    id = "bf16"
    wire: Wire = "f16"
    transcodes = True
    limit = 65280.0  # the largest bfloat16 that is not too large for a float16

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record."""
        return CodecSizes(scales_bytes=0, codes_bytes=layers * width * 2)

    def bound(self, rows: Floats) -> Floats:
        """Return half a unit in the last place, abs(x) * 2^-8, or 2^-24 if that is more.

        A bfloat16 is a float16 exactly from 2^-14 on; below, float16 goes in steps of 2^-24.
        """
        return np.maximum(np.abs(rows) * np.float32(2.0**-8), np.float32(2.0**-24))

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Round to float16."""
        out_codes.view("<f2")[:] = decode_bfloat16(codes)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        codes = encode_bfloat16(rows).reshape(len(rows), -1)
        return np.empty((len(rows), 0), np.uint8), codes


class Float8Codec(Codec):
    """value = e4m3(code) * scale, rounded to float16; scale = m/448 for the largest magnitude m.

    Unlike int8 it keeps small values of a group as exact, relatively, as large ones.
    """

    wire: Wire = "f16"
    transcodes = True
    limit = 65024.0  # scales are rounded up, and a decoded value must fit in a float16

    def __init__(self, group: int) -> None:
        self.group: int = group
        self.id = f"fp8-g{group}"
        self._values = e4m3_values()

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        return wire_sizes("q8", layers * width, self.group)

    def bound(self, rows: Floats) -> Floats:
        """Return abs(x) * (2^-4 + 2^-10) + s * 2^-10 + 2^-24, s = m/448 * (1 + 2^-10) + 2^-24.

        e4m3 has four bits of precision, and steps of s * 2^-9 near zero. The other terms are
        for the float16 that the graph is fed.
        """
        largest = np.abs(rows.reshape(-1, self.group)).max(axis=1, initial=0.0)
        scale = largest / E4M3_LARGEST * (1 + 2.0**-10) + SMALLEST_SCALE
        fixed = np.repeat(scale * 2.0**-10 + SMALLEST_SCALE, self.group).reshape(rows.shape)
        total: Floats = (np.abs(rows) * (2.0**-4 + 2.0**-10) + fixed).astype(np.float32)
        return total

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Look the floats up, scale them and round to float16."""
        factors = scales.view("<f2").astype(np.float32)
        values = self._values[codes].reshape(*factors.shape, self.group)
        values *= factors[:, :, None]
        out_codes.view("<f2")[:] = values.reshape(codes.shape)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        groups = rows.reshape(-1, self.group)
        top, bottom = extremes(groups)
        largest: Floats = np.maximum(top, -bottom)
        steps = largest / np.float32(E4M3_LARGEST)
        scales = round_away_from_zero(steps)
        codes = encode_e4m3(in_steps(groups, scales))
        packed = scales.astype("<f2").view(np.uint8)
        return packed.reshape(len(rows), -1), codes.reshape(len(rows), -1)
