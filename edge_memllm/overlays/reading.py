"""Opens an overlay file that may be hostile: everything is checked once, then it is mapped.

The digest of all data is checked here. A file that is changed in place afterwards is not noticed,
and one that is cut short kills the process (SIGBUS): replace a file by renaming another over it,
which is what this package does.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Bytes
from edge_memllm.errors import ArtifactError, CorruptionError
from edge_memllm.open_files import close_file, not_read
from edge_memllm.overlays.columns import places_of
from edge_memllm.overlays.header import KIND, Header
from edge_memllm.overlays.overlay import (
    LARGEST_FACTOR,
    MOST_TOKENS,
    OPERATIONS,
    WITH_ROW,
    Entries,
    Overlay,
)
from edge_memllm.tensor_header import tensor_views

# O_NONBLOCK: opening a pipe must not wait for a writer.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_BLOCK = 1 << 16  # entries, or bytes / 16 of rows, checked at a time
_FLOATS = {"f32": "<f4", "f16": "<f2"}
_COPY_AGAIN = "The file is incomplete or damaged; copy it again."


def open_overlay(path: str | os.PathLike[str]) -> Overlay:
    """Open the overlay file at `path`; its memory is mapped, and given back with the last user.

    Raises `ArtifactError` for what is no overlay or says what cannot be, `CorruptionError` for
    one that is damaged, and `StorageError` when reading fails.
    """
    where = Path(path)
    try:
        file = os.open(where, _FLAGS)
    except FileNotFoundError:
        raise ArtifactError(f"{where}: the file does not exist, expected an overlay.") from None
    except OSError as error:
        raise ArtifactError(f"{where}: cannot be opened ({error.strerror}).") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{where}: this is not a regular file, expected an overlay.")
        with os.fdopen(file, "rb", closefd=False) as stream:
            return _read(stream, status.st_size, str(where))
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
