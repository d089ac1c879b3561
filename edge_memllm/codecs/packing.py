"""Codes of two to six bits, one per byte or packed; the first in the lowest bits."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.wire import Bytes, pack_nibbles, unpack_nibbles


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
