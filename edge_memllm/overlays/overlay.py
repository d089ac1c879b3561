"""An overlay: what to do with the memory rows of chosen tokens in chosen layers.

Frozen and read only; its arrays may lie in memory or be mapped from a file. Knows codecs and
token ids; nothing of tables, and of files only the name that errors need.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.artifact.manifest import Manifest
from edge_memllm.codecs import GROUPS, Codec, UnencodableRowError, get_codec
from edge_memllm.codecs.wire import CodecSizes
from edge_memllm.errors import RequestError

Operation = Literal["replace", "add", "scale", "blank"]

OPERATIONS: tuple[Operation, ...] = get_args(Operation)  # the place is the number in a file
WITH_ROW = 2  # the first two come with a row
CODECS = ("f32", "f16", *(f"int{bits}-g{group}" for bits in (8, 4) for group in GROUPS))
MOST_TOKENS, MOST_LAYERS, MOST_WIDTH = 1 << 24, 1024, 1 << 17
MOST_DESCRIPTION = 2000
LARGEST_FACTOR = 65504.0  # of a scale operation, in magnitude
_ROW_ALIGNMENT = 4

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
_RESERVED = ("all", "none")  # what an interactive session calls a choice
_IDENTITY = re.compile(r"sha256:[0-9a-f]{64}")

TokenIds = Sequence[int] | NDArray[Any]

_LAYER_BITS = 16


@dataclass(frozen=True, slots=True)
class OverlaySpec:
    """What an overlay is called, which model it is for, and how it stores rows.

    `identity` and the shape are the model's: `layers` is L, its memory rows per token, `width` D.
    Raises `RequestError` for a value that cannot be.
    """

    name: str  # letters, digits, '.', '_' and '-': what a generation switches it on by
    identity: str  # "sha256:<64 hex digits>"
    layers: int
    width: int
    codec: str = "f16"  # one of CODECS
    description: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in _RESERVED:
            raise RequestError(
                f"The name of an overlay is {self.name!a:.80}, expected up to 64 letters, digits, "
                "'.', '_' or '-', a letter or digit first, and not 'all' or 'none'."
            )
        if len(self.description) > MOST_DESCRIPTION or not _printable(self.description):
            raise RequestError(
                f"The description of overlay '{self.name}' has {len(self.description)} characters, "
                f"expected at most {MOST_DESCRIPTION}, all of them printable."
            )
        if not _IDENTITY.fullmatch(self.identity):
            raise RequestError(
                f"Overlay '{self.name}' is for model {self.identity!a:.80}, expected 'sha256:' and "
                "64 hex digits."
            )
        _check_range(self.name, "layers", self.layers, MOST_LAYERS)
        _check_range(self.name, "width", self.width, MOST_WIDTH)
        if self.codec not in CODECS:
            raise RequestError(
                f"Overlay '{self.name}' stores rows as {self.codec!a:.80}, expected one of "
                f"{', '.join(CODECS)}."
            )
        try:
            _ = self.sizes
        except ValueError as error:
            raise RequestError(f"Overlay '{self.name}': {error}") from error

    @classmethod
    def for_model(
        cls, manifest: Manifest, name: str, *, codec: str = "f16", description: str = ""
    ) -> OverlaySpec:
        """Return the spec of an overlay for the model of a manifest. Raises `RequestError`."""
        model = manifest.model
        if not model.memory.layers:
            raise RequestError(
                "A model without token memory (dense) has no memory rows: nothing to lay over."
            )
        layers, width = model.memory.layers, model.memory.width
        return cls(name, model.identity, layers, width, codec, description)

    @property
    def stored(self) -> Codec:
        """The codec of the rows."""
        return get_codec(self.codec)

    @property
    def sizes(self) -> CodecSizes:
        """Bytes of scales and of codes of one row."""
        return self.stored.sizes(1, self.width)

    @property
    def row_bytes(self) -> int:
        """Bytes from one stored row to the next: scales, codes, and zeros up to a multiple of 4."""
        used = self.sizes.scales_bytes + self.sizes.codes_bytes
        return -(-used // _ROW_ALIGNMENT) * _ROW_ALIGNMENT

    def check_fits(self, manifest: Manifest) -> None:
        """Raise `RequestError` unless this is for the model of `manifest`."""
        model = manifest.model
        if self.identity != model.identity:
            raise RequestError(
                f"Overlay '{self.name}' is for model {self.identity[:19]}, this is "
                f"{model.identity[:19]}. Use it with an export of the checkpoint it was made for."
            )
        found, expected = (self.layers, self.width), (model.memory.layers, model.memory.width)
        if found != expected:
            raise RequestError(
                f"Overlay '{self.name}' has rows of {found[0]} layers of {found[1]}, the model "
                f"has {expected[0]} of {expected[1]}. Make the overlay again."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One operation on the row of one token in one memory layer."""

    token: int
    layer: int
    operation: Operation
    row: NDArray[Any] | None = None  # [D], only to replace or to add
    factor: float = 1.0  # only to scale


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """The operations as columns of n each, sorted by token, then layer, no pair twice."""

    tokens: NDArray[np.uint32]
    places: NDArray[np.uint32]  # rows that entries before have: where its own row stands, if any
    factors: NDArray[np.float32]  # 1 for all but "scale"
    layers: NDArray[np.uint16]
    operations: NDArray[np.uint8]  # numbers of OPERATIONS

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Overlay:
    """An overlay ready to be laid over a table. Thread-safe: nothing of it ever changes."""

    spec: OverlaySpec
    entries: Entries
    rows: Bytes  # [r, row_bytes]
    where: str  # the file, for errors; or how it was made

    @property
    def name(self) -> str:
        """What it is called."""
        return self.spec.name

    def __len__(self) -> int:
        return len(self.entries)

    def digest(self) -> str:
        """Return the sha256 of what it does, whatever file it is in; reads all of it."""
        found = hashlib.sha256(self.spec.codec.encode())
        columns = (getattr(self.entries, each.name) for each in fields(Entries))
        for column in (*columns, self.rows):
            found.update(np.ascontiguousarray(column).data)
        return found.hexdigest()

    def find(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for ids [U], which entries [m] there are and whose [m] (places in `tokens`)."""
        # In the column's own type: otherwise all of it would be converted, and copied.
        wanted = tokens.astype(np.uint32)
        first = np.searchsorted(self.entries.tokens, wanted, "left")
        counts = np.searchsorted(self.entries.tokens, wanted, "right") - first
        owners = np.repeat(np.arange(len(tokens)), counts)
        before = np.cumsum(counts) - counts
        return np.arange(len(owners)) + (first - before)[owners], owners

    def stored_rows(self, places: NDArray[Any] | slice) -> tuple[Bytes, Bytes]:
        """Return scales [m, ...] and codes [m, ...] of stored rows, as bytes."""
        rows, sizes = self.rows[places], self.spec.sizes
        end = sizes.scales_bytes + sizes.codes_bytes
        return rows[:, : sizes.scales_bytes], rows[:, sizes.scales_bytes : end]

    def decoded_rows(self, places: NDArray[Any]) -> Floats:
        """Return stored rows as float32 [m, D]."""
        scales, codes = self.stored_rows(places)
        return self.spec.stored.decode(scales, codes, 1, self.spec.width)[:, 0]

    def edits(self, chosen: Iterable[int] | None = None) -> Iterator[Edit]:
        """Yield entries, rows as float32: those at some places, None for all."""
        entries = self.entries
        for at in range(len(entries)) if chosen is None else chosen:
            number = int(entries.operations[at])
            row = self.decoded_rows(entries.places[at : at + 1])[0] if number < WITH_ROW else None
            yield Edit(
                int(entries.tokens[at]),
                int(entries.layers[at]),
                OPERATIONS[number],
                row,
                float(entries.factors[at]),
            )

    def check_fits(self, manifest: Manifest) -> None:
        """Raise `RequestError` unless this is for the model of `manifest`."""
        self.spec.check_fits(manifest)
        largest = int(self.entries.tokens[-1]) if len(self) else 0
        if largest >= manifest.model.vocab_size:
            raise RequestError(
                f"Overlay '{self.name}' has a row of token {largest}, the model has "
                f"{manifest.model.vocab_size} tokens. Make the overlay again."
            )


def _printable(text: str) -> bool:
    return all(each.isprintable() or each == "\n" for each in text)


def _check_range(name: str, what: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise RequestError(f"Overlay '{name}': {what} is {value}, expected 1 to {most}.")


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
        tokens: TokenIds,
        layers: TokenIds,
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


def encode_rows(spec: OverlaySpec, rows: Floats, tokens: TokenIds, layers: TokenIds) -> Bytes:
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
