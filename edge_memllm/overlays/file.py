"""An overlay as a file, read and written: a safetensors header, the rows, then the entries.

The spec and three numbers determine the header: writing builds it, reading builds it again and
compares, and nothing else is accepted.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.artifact.atomic import WholeFile
from edge_memllm.artifact.open_files import close_file, not_read, open_regular
from edge_memllm.artifact.tensor_header import (
    DIGEST,
    PAGE,
    UNSEALED,
    FileKind,
    Tensors,
    data_bytes,
    header_bytes,
    tensor_views,
)
from edge_memllm.checked_values import Fields
from edge_memllm.errors import ArtifactError, CorruptionError, RequestError
from edge_memllm.overlays.overlay import (
    LARGEST_FACTOR,
    MOST_TOKENS,
    OPERATIONS,
    WITH_ROW,
    Columns,
    Edit,
    Entries,
    Operation,
    Overlay,
    OverlaySpec,
    TokenIds,
    encode_rows,
    in_order,
    padded,
    places_of,
    row_of,
)

if TYPE_CHECKING:
    from hashlib import _Hash


KIND = FileKind(
    format="edge-memllm-overlay",
    version="1",
    name="overlay",
    meaning="an overlay",
    advice="Make one with 'edge-memllm overlay'.",
    anew="make the overlay again",
)
SUFFIX = ".overlay.safetensors"
MOST_ENTRIES = (1 << 32) - 1
# Behind the rows, in this order: the widest first, so that each column is aligned.
COLUMNS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<u4"),
    "places": np.dtype("<u4"),
    "factors": np.dtype("<f4"),
    "layers": np.dtype("<u2"),
    "operations": np.dtype("u1"),
}
_KEYS = ("name", "description", "identity", "layers", "width", "codec", "entries", "rows", "sha256")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
_ANY = re.compile(r"(?s).*")

_BLOCK = 1 << 16  # entries, or bytes / 16 of rows, checked at a time
_FLOATS = {"f32": "<f4", "f16": "<f2"}
_COPY_AGAIN = "The file is incomplete or damaged; copy it again."


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says."""

    spec: OverlaySpec
    entries: int
    rows: int
    sha256: str = UNSEALED  # of what stands behind the header, then the header with these zeros

    @property
    def size(self) -> int:
        """Bytes in front of the rows: told by the spec alone, so that it can be written last."""
        return len(Header(self.spec, MOST_ENTRIES, MOST_ENTRIES)._to_bytes(PAGE))

    @property
    def data_bytes(self) -> int:
        """Bytes behind the header."""
        return data_bytes(self.tensors)

    @property
    def tensors(self) -> Tensors:
        """What stands behind the header, in order."""
        columns = {name: (kind, (self.entries,)) for name, kind in COLUMNS.items()}
        return {"rows": (np.dtype("u1"), (self.rows, self.spec.row_bytes)), **columns}

    def to_bytes(self) -> bytes:
        """Return length, JSON, and spaces up to the size."""
        return self._to_bytes(self.size)

    def sealed(self, digest: _Hash) -> Header:
        """Return this header with its digest; `digest` has seen everything behind the header."""
        complete = digest.copy()
        complete.update(replace(self, sha256=UNSEALED).to_bytes())
        return replace(self, sha256=complete.hexdigest())

    @classmethod
    def parse(cls, data: bytes, where: str) -> Header:
        """Parse length and JSON. Raises `ArtifactError` for what `to_bytes` would not write."""
        header = _from_metadata(KIND.metadata(data, where, _KEYS), where)
        KIND.check_same(data, header.to_bytes(), where)
        return header

    def _to_bytes(self, unit: int) -> bytes:
        spec = self.spec
        metadata = {
            "format": KIND.format,
            "format_version": KIND.version,
            "name": spec.name,
            "description": spec.description,
            "identity": spec.identity,
            "layers": str(spec.layers),
            "width": str(spec.width),
            "codec": spec.codec,
            "entries": str(self.entries),
            "rows": str(self.rows),
            "sha256": self.sha256,
        }
        return header_bytes(metadata, self.tensors, unit)


def _from_metadata(fields: Fields, where: str) -> Header:
    def number(key: str) -> int:
        return int(fields.text(key, _NUMBER, "a whole number as text"))

    try:
        spec = OverlaySpec(
            name=fields.text("name", _ANY, "text"),
            identity=fields.text("identity", _ANY, "text"),
            layers=number("layers"),
            width=number("width"),
            codec=fields.text("codec", _ANY, "text"),
            description=fields.text("description", _ANY, "text"),
        )
    except RequestError as error:
        raise ArtifactError(f"{where}: {error}") from error
    entries, rows = number("entries"), number("rows")
    if not rows <= entries <= MOST_ENTRIES:
        raise ArtifactError(
            f"{where}: {rows} rows and {entries} entries, expected at most one row for each entry "
            f"and at most {MOST_ENTRIES} entries."
        )
    return Header(spec, entries, rows, fields.text("sha256", DIGEST, "64 hex digits"))


def open_overlay(path: str | os.PathLike[str]) -> Overlay:
    """Open the overlay file at `path`; its memory is mapped, and given back with the last user.

    Raises `ArtifactError` for what is no overlay or says what cannot be, `CorruptionError` for
    one that is damaged, and `StorageError` when reading fails.
    """
    where = Path(path)
    file, size = open_regular(where, "an overlay")
    try:
        with os.fdopen(file, "rb", closefd=False) as stream:
            return _read(stream, size, str(where))
    except OSError as error:
        raise not_read(where, error) from error
    finally:
        close_file(file)  # a map keeps a descriptor of its own


def _read(stream: BufferedReader, size: int, where: str) -> Overlay:
    header = _read_header(stream, size, where)
    found = header.sealed(hashlib.file_digest(stream, "sha256")).sha256
    if found != header.sha256:
        raise CorruptionError(
            f"{where}: its sha256 is {found[:12]}, the header says {header.sha256[:12]}. "
            f"{_COPY_AGAIN}"
        )
    data = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    overlay = _overlay(data, header, where)
    _check_entries(overlay)
    _check_rows(overlay)
    if hasattr(mmap, "MADV_RANDOM"):  # one row is wanted at a time, not what lies behind it
        data.madvise(mmap.MADV_RANDOM)
    return overlay


def _read_header(stream: BufferedReader, size: int, where: str) -> Header:
    header = Header.parse(KIND.read(stream, size, where), where)
    expected = header.size + header.data_bytes
    if size != expected:
        raise CorruptionError(f"{where}: {size} bytes, expected {expected}. {_COPY_AGAIN}")
    return header


def _overlay(data: mmap.mmap, header: Header, where: str) -> Overlay:
    """Return views of the mapped file."""
    columns = tensor_views(data, header.size, header.tensors)
    rows = columns.pop("rows")
    return Overlay(header.spec, Entries(**columns), rows, where)


def _check_entries(overlay: Overlay) -> None:
    """Check every entry, a block at a time."""
    entries, before, places = overlay.entries, -1, 0
    for start in range(0, len(entries), _BLOCK):
        part = slice(start, start + _BLOCK)
        operations, layers = entries.operations[part], entries.layers[part]
        keys = (entries.tokens[part].astype(np.int64) << 16) | layers
        rows = operations < WITH_ROW
        factors = entries.factors[part]
        scaled = operations == OPERATIONS.index("scale")
        right = (
            (np.diff(keys, prepend=before) > 0)
            & (entries.tokens[part] < MOST_TOKENS)
            & (layers < overlay.spec.layers)
            & (operations < len(OPERATIONS))
            & (entries.places[part] == places_of(operations).astype(np.int64) + places)
            & np.where(scaled, np.abs(factors) <= LARGEST_FACTOR, factors == 1)
        )
        if not right.all():
            at = start + int(right.argmin())
            raise ArtifactError(
                f"{overlay.where}: entry {at} (token {entries.tokens[at]}, layer "
                f"{entries.layers[at]}) is out of order, or its layer, operation, place or factor "
                "cannot be. Make the overlay again."
            )
        before, places = int(keys[-1]), places + int(rows.sum())
    if places != len(overlay.rows):
        raise ArtifactError(
            f"{overlay.where}: {len(overlay.rows)} rows, expected {places}, one for each entry "
            "with a row. Make the overlay again."
        )


def _check_rows(overlay: Overlay) -> None:
    """Refuse rows that hold NaN or infinity: in their scales, or in values without scales."""
    step = max(1, _BLOCK * 16 // overlay.spec.row_bytes)
    for start in range(0, len(overlay.rows), step):
        scales, codes = overlay.stored_rows(slice(start, start + step))
        finite = np.isfinite(_numbers(overlay, scales, codes)).all(axis=1)
        if not finite.all():
            at = start + int(finite.argmin())
            raise ArtifactError(
                f"{overlay.where}: stored row {at} holds NaN or infinity. Make the overlay again."
            )


def _numbers(overlay: Overlay, scales: Bytes, codes: Bytes) -> NDArray[Any]:
    """Return the floats that stored rows are made of."""
    kind = _FLOATS.get(overlay.spec.codec)
    if kind is not None:
        return np.ascontiguousarray(codes).view(kind)
    return np.ascontiguousarray(scales).view("<f2")


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    path: Path
    spec: OverlaySpec
    entries: int
    rows: int
    bytes: int


class OverlayWriter:
    """Takes edits in ascending order of (token, layer), then `finish`. Use it in a with-statement.

    What is not finished leaves nothing under `path`. Raises `RequestError` for a name without the
    suffix, an existing file unless `overwrite`, and edits that cannot be; `StorageError` when
    writing fails.
    """

    def __init__(
        self, path: str | os.PathLike[str], spec: OverlaySpec, *, overwrite: bool = False
    ) -> None:
        if not Path(path).name.endswith(SUFFIX) or Path(path).name == SUFFIX:
            raise RequestError(f"{path}: expected a name that ends in '{SUFFIX}'.")
        self._spec = spec
        self._columns = Columns(spec)
        self._rows = 0
        self._digest = hashlib.sha256()
        self._file = WholeFile(path, overwrite=overwrite)
        # Room for the header: it says the digest, so it comes last.
        self._file.seek(Header(spec, 0, 0).size)

    def replace(self, tokens: TokenIds, layers: TokenIds, rows: Floats) -> None:
        """Replace rows by `rows` [n, D]: that of `tokens[i]` in `layers[i]` by `rows[i]`."""
        self._with_rows(tokens, layers, "replace", rows)

    def replace_stored(
        self, tokens: TokenIds, layers: TokenIds, scales: Bytes, codes: Bytes
    ) -> None:
        """Replace rows by rows that are in this overlay's codec already, bytes [n, ...]."""
        self._columns.extend(tokens, layers, "replace")
        self._append(padded(self._spec, scales, codes))

    def add(self, tokens: TokenIds, layers: TokenIds, rows: Floats) -> None:
        """Add `rows` [n, D] to rows."""
        self._with_rows(tokens, layers, "add", rows)

    def scale(self, tokens: TokenIds, layers: TokenIds, factor: float) -> None:
        """Multiply n rows by a number."""
        self._columns.extend(tokens, layers, "scale", factor)

    def blank(self, tokens: TokenIds, layers: TokenIds) -> None:
        """Make n rows zero."""
        self._columns.extend(tokens, layers, "blank")

    def edit(self, edit: Edit) -> None:
        """Take one edit of any kind."""
        row = row_of(self._spec, edit)
        self._columns.extend([edit.token], [edit.layer], edit.operation, edit.factor)
        self._append(row)

    def finish(self) -> Written:
        """Write what is left, force it to the disk, and let the file appear under its name."""
        entries = self._columns.entries()
        for name, kind in COLUMNS.items():
            self._write(getattr(entries, name).astype(kind, copy=False).tobytes())
        header = Header(self._spec, len(entries), self._rows).sealed(self._digest)
        self._file.seek(0)
        self._file.write(header.to_bytes())
        self._file.publish()
        size = header.size + header.data_bytes
        return Written(self._file.path, self._spec, len(entries), self._rows, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, traceback)

    def _with_rows(
        self, tokens: TokenIds, layers: TokenIds, operation: Operation, rows: Floats
    ) -> None:
        stored = encode_rows(self._spec, rows, tokens, layers)
        self._columns.extend(tokens, layers, operation)
        self._append(stored)

    def _append(self, stored: Bytes) -> None:
        self._write(stored.tobytes())
        self._rows += len(stored)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def write_overlay(
    path: str | os.PathLike[str],
    spec: OverlaySpec,
    edits: Iterable[Edit],
    *,
    overwrite: bool = False,
) -> Written:
    """Write edits, in any order, as an overlay file. Raises as `OverlayWriter` does."""
    with OverlayWriter(path, spec, overwrite=overwrite) as writer:
        for edit in in_order(edits):
            writer.edit(edit)
        return writer.finish()
