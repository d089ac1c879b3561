"""lowrank: each layer's rows as combinations of r rows that all tokens share.

What is stored of a token are its r coefficients per layer, by another codec. The shared rows are
the codec's parameters, float16 [L, r, D]: the directions in which the layer's rows are largest
(the right singular vectors of all its rows, cut after the first r).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.codecs.codec import Codec, UnencodableRowError
from edge_memllm.codecs.wire import CodecSizes, Wire


class LowRankCodec(Codec):
    """row = coefficients @ basis, rounded to float16; coefficients are stored by `inner`."""

    wire: Wire = "f16"
    transcodes = True
    limit = 65504.0

    def __init__(self, rank: int, inner: Codec, basis: Floats | None = None) -> None:
        self.id = f"lowrank-r{rank}-{inner.id}"
        self.rank = rank
        self.searches = inner.searches
        self._inner = inner
        self._basis = basis  # float32 [L, r, D]

    @property
    def parameters(self) -> bytes:
        """The shared rows, float16 [L, r, D]."""
        return b"" if self._basis is None else self._basis.astype("<f2").tobytes()

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` for a rank beyond the width."""
        if self.rank > width:
            raise ValueError(
                f"codec {self.id}: the rank is {self.rank}, expected at most the width {width}."
            )
        return self._inner.sizes(layers, self.rank)

    def parameters_bytes(self, layers: int, width: int) -> int:
        """Return the bytes of the shared rows."""
        return layers * self.rank * width * 2

    def with_parameters(self, parameters: bytes, layers: int, width: int) -> LowRankCodec:
        """Return this codec with its shared rows. Raises `ValueError` unless all are finite."""
        self._check_parameters(parameters, layers, width)
        basis = np.frombuffer(parameters, "<f2").astype(np.float32)
        # Directions have length 1; the room is for rounding.
        if not (np.abs(basis) <= 1.01).all():
            raise ValueError(f"codec {self.id}: shared rows hold values beyond 1 or no numbers.")
        return LowRankCodec(self.rank, self._inner, basis.reshape(layers, self.rank, width))

    def fit(self, layers: int, width: int) -> LowRankFit:
        """Begin to find the shared rows."""
        return LowRankFit(self.rank, layers, width)

    def bound(self, rows: Floats) -> Floats:
        """Return the distance to the rows without quantised coefficients, and what that adds.

        With c the coefficients, B the basis and b the inner codec's bound: abs(c B - x) +
        b abs(B) + (abs(c) + b) abs(B) 2^-10 + 2^-24. The last two terms are for summing in
        float32 and for the float16 that the graph is fed.
        """
        basis = self._made(rows)
        coefficients = _products(rows, basis.transpose(0, 2, 1))
        inner = self._inner.bound(coefficients)
        sizes = np.abs(basis)
        missed = np.abs(_products(coefficients, basis) - rows)
        added = _products(inner + (np.abs(coefficients) + inner) * np.float32(2.0**-10), sizes)
        total: Floats = missed + added + np.float32(2.0**-24)
        return total

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Multiply with the shared rows in float32 and round to float16."""
        basis = self._made()
        coefficients = self._inner.decode(scales, codes, len(basis), self.rank)
        rows = _products(coefficients, basis).reshape(len(codes), out_codes.shape[1] // 2)
        out_codes.view("<f2")[:] = rows

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        coefficients = _products(rows, self._made(rows).transpose(0, 2, 1))
        try:
            return self._inner.encode(coefficients, search=search)
        except UnencodableRowError as error:
            reason = f"coefficients: {error.reason}"
            raise UnencodableRowError(error.row, error.layer, reason) from error

    def _made(self, rows: Floats | None = None) -> Floats:
        """Return the shared rows. Raises `ValueError` without, or for rows of another shape."""
        basis = self._basis
        if basis is None or (rows is not None and rows.shape[1:] != basis.shape[::2]):
            has = "no shared rows yet" if basis is None else f"shared rows of {basis.shape[::2]}"
            found = "some" if rows is None else str(rows.shape[1:])
            raise ValueError(f"codec {self.id}: has {has}, to encode or decode {found}.")
        return basis


class LowRankFit:
    """The sum of the outer products of all rows: D x D numbers per layer, however many rows."""

    def __init__(self, rank: int, layers: int, width: int) -> None:
        self._rank = rank
        self._moments = np.zeros((layers, width, width), np.float32)

    def add(self, rows: Floats, weights: Floats | None = None) -> None:
        """Add rows [N, L, D], each as often as `weights` [N] say."""
        for layer, moment in enumerate(self._moments):
            part = np.ascontiguousarray(rows[:, layer])
            weighted = part if weights is None else part * weights[:, None].astype(np.float32)
            moment += weighted.T @ part

    def parameters(self) -> bytes:
        """Return the directions of the largest eigenvalues, the largest first, in float16."""
        return b"".join(_directions(each, self._rank) for each in self._moments)


def _directions(moment: NDArray[np.float32], rank: int) -> bytes:
    _, vectors = np.linalg.eigh(moment.astype(np.float64))  # ascending, one in each column
    directions = vectors[:, ::-1][:, :rank].T
    # The sign of an eigenvector is arbitrary; its largest part is made positive.
    places = np.abs(directions).argmax(axis=1)
    signs = np.sign(directions[np.arange(rank), places])
    found: bytes = (directions * signs[:, None]).astype("<f2").tobytes()
    return found


def _products(left: Floats, right: Floats) -> Floats:
    """Return [N, L, k] times [L, k, m], layer by layer: [N, L, m]."""
    made: Floats = np.matmul(left.transpose(1, 0, 2), right).transpose(1, 0, 2)
    return np.ascontiguousarray(made)
