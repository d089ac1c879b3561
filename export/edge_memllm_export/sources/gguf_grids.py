"""The grids of GGUF's blocks: integer codes, scales and minima, so that w = scale * code + minimum.

What they give is what `gguf.quants.dequantize` gives, bit for bit in float32: the products of a
K-quant's scale and a block's are made in float32 as there. Types of two and three bits and those
with code books (IQ, TQ, FP4) have none here: the library dequantises them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats

Codes = NDArray[np.uint8 | np.int8]
# Codes [n, block], scales [n, blocks of a scale] and minima, of n stored blocks.
_Parts = tuple[Codes, Floats, Floats | None]

_BITS = np.arange(8, dtype=np.uint8)


@dataclass(frozen=True)
class Grid:
    """A matrix as it is stored: `weights` is what it stands for.

    Attributes:
        kind: The type's name in GGUF, such as Q4_K.
        codes: [rows, columns], int8 where there are no minima, else uint8.
        scales: [rows, columns // block].
        minima: As the scales; None where all are zero.
        block: Columns that share a scale, 16 or 32.
    """

    kind: str
    codes: Codes
    scales: Floats
    minima: Floats | None
    block: int

    def weights(self) -> Floats:
        """The matrix [rows, columns] in float32."""
        rows, columns = self.codes.shape
        blocks = self.codes.reshape(*self.scales.shape, self.block).astype(np.float32)
        blocks *= self.scales[..., None]
        if self.minima is not None:
            blocks += self.minima[..., None]
        return blocks.reshape(rows, columns)

    @property
    def finite(self) -> bool:
        """Whether every scale and minimum is a number."""
        minima = self.minima
        return bool(np.isfinite(self.scales).all()) and (
            minima is None or bool(np.isfinite(minima).all())
        )


def has_grid(kind: GGMLQuantizationType) -> bool:
    """Whether blocks of this type are a grid that `read_grid` reads."""
    return kind in _READERS


def read_grid(stored: Bytes, kind: GGMLQuantizationType) -> Grid:
    """The grid of rows of stored bytes [rows, bytes of a row]; `kind` is one that has a grid."""
    rows, (_, block_bytes) = len(stored), GGML_QUANT_SIZES[kind]
    with np.errstate(invalid="ignore"):  # who reads a damaged file asks `finite`
        codes, scales, minima = _READERS[kind](stored.reshape(-1, block_bytes))
    flat_codes, flat_scales = codes.reshape(rows, -1), scales.reshape(rows, -1)
    return Grid(
        kind=kind.name,
        codes=flat_codes,
        scales=flat_scales,
        minima=None if minima is None else minima.reshape(rows, -1),
        block=flat_codes.shape[1] // flat_scales.shape[1],
    )


def _halves(stored: Bytes) -> Floats:
    """Float16 numbers [n, k] of bytes [n, 2 k]."""
    return np.ascontiguousarray(stored).view("<f2").astype(np.float32)


def _nibbles(stored: Bytes) -> Bytes:
    """The lower four bits of all bytes [..., k], then the upper: [..., 2, k]."""
    return np.stack([stored & np.uint8(15), stored >> np.uint8(4)], axis=-2)


def _fifth_bits(stored: Bytes) -> Bytes:
    """Bit i of 32 as 0 or 16: [n, 4] to [n, 32]."""
    return np.unpackbits(stored, axis=1, bitorder="little") << np.uint8(4)


def _signed(codes: Bytes, zero: int) -> NDArray[np.int8]:
    return codes.view(np.int8) - np.int8(zero)


def _q4_0(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 2:]).reshape(len(blocks), 32)
    return _signed(codes, 8), _halves(blocks[:, :2]), None


def _q4_1(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 4:]).reshape(len(blocks), 32)
    return codes, _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q5_0(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 6:]).reshape(len(blocks), 32) | _fifth_bits(blocks[:, 2:6])
    return _signed(codes, 16), _halves(blocks[:, :2]), None


def _q5_1(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 8:]).reshape(len(blocks), 32) | _fifth_bits(blocks[:, 4:8])
    return codes, _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q8_0(blocks: Bytes) -> _Parts:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _halves(blocks[:, :2]), None


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima [n, 8] of K-quants' first 16 bytes: two halves, then 6 bits for each.

    The first four of each have their six bits in a byte; the others have four in the last bytes
    and two above those of the first four.
    """
    first, second, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (last & 15) | (first >> 2 & 48)], axis=1)
    minima = np.concatenate([second & 63, (last >> 4) | (second >> 2 & 48)], axis=1)
    return _halves(blocks[:, :2]) * scales, -(_halves(blocks[:, 2:4]) * minima)


def _q4_k(blocks: Bytes) -> _Parts:
    scales, minima = _k_scales(blocks)
    return _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256), scales, minima


def _q5_k(blocks: Bytes) -> _Parts:
    scales, minima = _k_scales(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (blocks[:, None, 16:48] >> _BITS[:, None] & 1) << 4
    return (low | high).reshape(-1, 256), scales, minima


def _q6_k(blocks: Bytes) -> _Parts:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> _BITS[::2, None] & np.uint8(3)
    codes: Bytes = (low | high.reshape(-1, 8, 32) << np.uint8(4)).reshape(-1, 256)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return _signed(codes, 32), _halves(blocks[:, 208:]) * scales, None


_READERS: dict[GGMLQuantizationType, Callable[[Bytes], _Parts]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
