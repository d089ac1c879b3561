"""Wire forms: how the graph is fed rows, whatever form a codec stores them in.

As arrays over U records:
    none    nothing
    f32     codes are float32 [U, L*D]
    f16     codes are float16 [U, L*D]
    q8      codes are uint8 [U, L*D]; value = (code - 128) * scale
    q4      codes are uint8 [U, L*D/2], low nibble first; value = (nibble - 8) * scale
    with    scales as float16 [U, L*D/G] for q8 and q4, one per group

Numbers are little-endian; groups of G values run along D, so they never cross a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_memllm.arrays import Bytes, Floats

Wire = Literal["none", "f32", "f16", "q8", "q4"]


@dataclass(frozen=True, slots=True)
class CodecSizes:
    """Bytes that one record spends on scales and on codes."""

    scales_bytes: int
    codes_bytes: int


def wire_sizes(wire: Wire, values: int, group: int | None) -> CodecSizes:
    """Return the bytes of `values` values per record; q8 and q4 need their group."""
    match wire:
        case "none":
            return CodecSizes(0, 0)
        case "f32":
            return CodecSizes(0, values * 4)
        case "f16":
            return CodecSizes(0, values * 2)
        case "q8" | "q4":
            assert group is not None  # both have groups
            return CodecSizes(values // group * 2, values if wire == "q8" else values // 2)


def decode_wire(wire: Wire, scales: Bytes, codes: Bytes, group: int | None) -> Floats:
    """Return what the graph makes of wire arrays, float32 [U, L*D]."""
    match wire:
        case "none":
            return np.empty((len(codes), 0), np.float32)
        case "f32":
            return codes.view("<f4").astype(np.float32)
        case "f16":
            return codes.view("<f2").astype(np.float32)
        case "q8":
            values = codes.astype(np.float32)
            values -= 128
        case "q4":
            values = unpack_nibbles(codes).astype(np.float32)
            values -= 8
    assert group is not None
    factors = scales.view("<f2").astype(np.float32)
    grouped = values.reshape(*factors.shape, group)
    grouped *= factors[:, :, None]
    return grouped.reshape(values.shape)


def pack_nibbles(codes: Bytes, out: Bytes | None = None) -> Bytes:
    """Pack codes [N, n] of four bits to [N, n/2], low nibble first."""
    packed = np.left_shift(codes[:, 1::2], np.uint8(4), out=out)
    packed |= codes[:, 0::2]
    return packed


def unpack_nibbles(packed: Bytes) -> Bytes:
    """Unpack [N, n/2] to codes [N, n] of four bits, low nibble first."""
    codes = np.empty((len(packed), packed.shape[1], 2), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=codes[:, :, 0])
    np.right_shift(packed, np.uint8(4), out=codes[:, :, 1])
    return codes.reshape(len(packed), packed.shape[1] * 2)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes [N, n], one per byte, to [N, n*bits/8]; n is a multiple of 8."""
    match bits:
        case 2:
            return _pack_pairs(codes)
        case 4:
            return pack_nibbles(codes)
        case _:
            return _pack_across_bytes(codes, bits)


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Unpack [N, n*bits/8] to codes [N, n], one per byte."""
    match bits:
        case 2:
            return _unpack_pairs(packed)
        case 4:
            return unpack_nibbles(packed)
        case _:
            return _unpack_across_bytes(packed, bits)


def _pack_pairs(codes: Bytes) -> Bytes:
    """Four codes of two bits to a byte."""
    packed = codes[:, 0::4].copy()
    for place in (1, 2, 3):
        packed |= codes[:, place::4] << np.uint8(2 * place)
    return packed


def _unpack_pairs(packed: Bytes) -> Bytes:
    codes = np.empty((*packed.shape, 4), np.uint8)
    for place in range(4):
        codes[:, :, place] = packed >> np.uint8(2 * place)
    codes &= np.uint8(3)
    return codes.reshape(len(packed), packed.shape[1] * 4)


def _pack_across_bytes(codes: Bytes, bits: int) -> Bytes:
    """Eight codes to a little-endian number of `bits` bytes."""
    packed = np.zeros((len(codes), codes.shape[1] // 8, bits), np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        part = codes[:, place::8]
        packed[:, :, byte] |= part << np.uint8(shift)
        if shift + bits > 8:
            packed[:, :, byte + 1] |= part >> np.uint8(8 - shift)
    return packed.reshape(len(codes), codes.shape[1] // 8 * bits)


def _unpack_across_bytes(packed: Bytes, bits: int) -> Bytes:
    count = packed.shape[1] // bits
    numbers = packed.reshape(len(packed), count, bits)
    codes = np.empty((len(packed), count, 8), np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        part = codes[:, :, place]
        np.right_shift(numbers[:, :, byte], np.uint8(shift), out=part)
        if shift + bits > 8:
            part |= numbers[:, :, byte + 1] << np.uint8(8 - shift)
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(len(packed), count * 8)
