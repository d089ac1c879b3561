"""Edits become columns and stored rows: what a file and an overlay in memory are made of.

Every wrong edit is refused here, whoever made it. Knows nothing of files.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs import UnencodableRowError
from edge_memllm.codecs.codec import Bytes, Floats
from edge_memllm.errors import RequestError
from edge_memllm.overlays.overlay import (
    LARGEST_FACTOR,
    MOST_TOKENS,
    OPERATIONS,
    WITH_ROW,
    Edit,
    Entries,
    Operation,
    Overlay,
    OverlaySpec,
)

Ids = Sequence[int] | NDArray[Any]

_LAYER_BITS = 16


class Columns:
    """Takes edits in ascending order of (token, layer): 13 bytes of memory for each."""

    def __init__(self, spec: OverlaySpec) -> None:
        self._spec = spec
        self._keys = array("Q")  # token and layer in one number
        self._operations = bytearray()
        self._factors = array("f")

    def __len__(self) -> int:
        return len(self._keys)

    def extend(
        self,
        tokens: Ids,
        layers: Ids,
        operation: Operation,
        factor: float = 1.0,
    ) -> None:
        """Take in one operation on each of n rows.

        Raises `RequestError` for an operation or a factor that cannot be, a token or layer out of
        range, and a row that does not come after the one before.
        """
        number = self._number_of(operation, factor)
        ids, depths = np.asarray(tokens, np.int64), np.asarray(layers, np.int64)
        self._check_range("token", ids, MOST_TOKENS)
        self._check_range("layer", depths, self._spec.layers)
        keys = (ids << _LAYER_BITS) | depths
        self._check_order(keys)
        self._factors.extend([factor] * len(keys))
        self._keys.frombytes(keys.astype(np.uint64).tobytes())
        self._operations += bytes([number]) * len(keys)

    def entries(self) -> Entries:
        """Return what was taken in."""
        keys = np.array(self._keys, np.uint64)
        operations = np.frombuffer(bytes(self._operations), np.uint8)
        return Entries(
            tokens=(keys >> np.uint64(_LAYER_BITS)).astype(np.uint32),
            places=places_of(operations),
            factors=np.array(self._factors, np.float32),
            layers=(keys & np.uint64((1 << _LAYER_BITS) - 1)).astype(np.uint16),
            operations=operations,
        )

    def _number_of(self, operation: Operation, factor: float) -> int:
        if operation not in OPERATIONS:
            raise RequestError(
                f"Overlay '{self._spec.name}': the operation is {operation!r}, expected one of "
                f"{', '.join(OPERATIONS)}."
            )
        if operation != "scale" and factor != 1:
            raise RequestError(
                f"Overlay '{self._spec.name}': {operation} with the factor {factor:g}, which only "
                "scale has."
            )
        if not abs(factor) <= LARGEST_FACTOR:  # False for NaN
            raise RequestError(
                f"Overlay '{self._spec.name}': the factor is {factor}, expected a number from "
                f"{-LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}."
            )
        return OPERATIONS.index(operation)

    def _check_range(self, what: str, found: NDArray[np.int64], end: int) -> None:
        wrong = found[(found < 0) | (found >= end)]
        if wrong.size:
            raise RequestError(
                f"Overlay '{self._spec.name}': {what} {wrong[0]}, expected 0 to {end - 1}."
            )

    def _check_order(self, keys: NDArray[np.int64]) -> None:
        before = self._keys[-1:].tolist()
        steps = np.diff(np.concatenate([np.array(before, np.int64), keys]))
        if (steps <= 0).any():
            key = int(keys[int(np.argmax(steps <= 0)) + 1 - len(before)])
            token, layer = key >> _LAYER_BITS, key & ((1 << _LAYER_BITS) - 1)
            same = "a second operation on" if (steps == 0).any() else "not in ascending order:"
            raise RequestError(
                f"Overlay '{self._spec.name}': {same} token {token}, layer {layer}. Give every "
                "token and layer one operation, sorted by both."
            )


def places_of(operations: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return, for each entry, how many entries before it have a row."""
    rows = operations < WITH_ROW
    return (np.cumsum(rows) - rows).astype(np.uint32)


def encode_rows(spec: OverlaySpec, rows: Floats, tokens: Ids, layers: Ids) -> Bytes:
    """Return rows [n, D] as stored, [n, row_bytes].

    Raises `RequestError` for another width and for values that cannot be stored, naming where.
    """
    rows = np.asarray(rows, np.float32)
    if rows.shape != (len(tokens), spec.width):
        raise RequestError(
            f"Overlay '{spec.name}': rows {list(rows.shape)}, expected {[len(tokens), spec.width]}."
        )
    try:
        scales, codes = spec.stored.encode(rows[:, None])
    except UnencodableRowError as error:
        raise RequestError(
            f"Overlay '{spec.name}': token {tokens[error.row]}, layer {layers[error.row]}: "
            f"{error.reason}."
        ) from error
    return padded(spec, scales, codes)


def padded(spec: OverlaySpec, scales: Bytes, codes: Bytes) -> Bytes:
    """Return scales [n, ...] and codes [n, ...] side by side, [n, row_bytes]."""
    stored = np.zeros((len(codes), spec.row_bytes), np.uint8)
    stored[:, : scales.shape[1]] = scales
    stored[:, scales.shape[1] : scales.shape[1] + codes.shape[1]] = codes
    return stored


def row_of(spec: OverlaySpec, edit: Edit) -> Bytes:
    """Return the stored row of an edit, [1, row_bytes], or none, [0, row_bytes].

    Raises `RequestError` for an edit without the row it needs, or with one it has no use for.
    """
    if (edit.row is not None) != (edit.operation in OPERATIONS[:WITH_ROW]):
        found = "no row" if edit.row is None else "a row"
        raise RequestError(
            f"Overlay '{spec.name}': token {edit.token}, layer {edit.layer}: {edit.operation} with "
            f"{found}. A row goes with {' and '.join(OPERATIONS[:WITH_ROW])}."
        )
    if edit.row is None:
        return np.zeros((0, spec.row_bytes), np.uint8)
    return encode_rows(spec, edit.row[None], [edit.token], [edit.layer])


def in_order(edits: Iterable[Edit]) -> list[Edit]:
    """Return edits as an overlay stores them."""
    return sorted(edits, key=lambda edit: (edit.token, edit.layer))


def overlay_of(spec: OverlaySpec, edits: Iterable[Edit]) -> Overlay:
    """Return an overlay made of edits, in any order, without a file.

    Raises `RequestError` for edits that cannot be, or two on one token and layer.
    """
    columns, rows = Columns(spec), [np.zeros((0, spec.row_bytes), np.uint8)]
    for edit in in_order(edits):
        rows.append(row_of(spec, edit))
        columns.extend([edit.token], [edit.layer], edit.operation, edit.factor)
    return Overlay(spec, columns.entries(), np.concatenate(rows), f"overlay '{spec.name}'")
