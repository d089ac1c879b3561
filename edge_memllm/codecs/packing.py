"""Codes of two, three and four bits, one per byte or packed; the first in the lowest bits."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.wire import Bytes, pack_nibbles, unpack_nibbles


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes [N, n], one per byte, to [N, n*bits/8]; n is a multiple of 8."""
    return {2: _pack_pairs, 3: _pack_triples, 4: pack_nibbles}[bits](codes)


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Unpack [N, n*bits/8] to codes [N, n], one per byte."""
    return {2: _unpack_pairs, 3: _unpack_triples, 4: unpack_nibbles}[bits](packed)


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


def _pack_triples(codes: Bytes) -> Bytes:
    """Eight codes of three bits to a little-endian number of three bytes."""
    numbers = codes[:, 0::8].astype("<u4")
    for place in range(1, 8):
        numbers |= codes[:, place::8].astype("<u4") << np.uint32(3 * place)
    wide = numbers.view(np.uint8).reshape(*numbers.shape, 4)
    return wide[:, :, :3].reshape(len(codes), numbers.shape[1] * 3)


def _unpack_triples(packed: Bytes) -> Bytes:
    groups = packed.shape[1] // 3
    wide = np.zeros((len(packed), groups, 4), np.uint8)
    wide[:, :, :3] = packed.reshape(len(packed), groups, 3)
    numbers = wide.view("<u4")  # [N, n/8, 1]
    shifts = np.arange(0, 24, 3, dtype=np.uint32)
    codes = (numbers >> shifts).astype(np.uint8)
    codes &= np.uint8(7)
    return codes.reshape(len(packed), groups * 8)
