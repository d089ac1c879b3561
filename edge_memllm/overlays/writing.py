"""Writes an overlay file: rows as they come, then the columns, the header last of all.

Memory stays at what one call brings and 13 bytes for each entry. The file appears under its name
in one rename once it is complete and on the disk; the same edits give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_memllm.atomic import WholeFile
from edge_memllm.codecs.codec import Bytes, Floats
from edge_memllm.errors import RequestError
from edge_memllm.overlays.columns import Columns, Ids, encode_rows, in_order, padded, row_of
from edge_memllm.overlays.header import COLUMNS, SUFFIX, Header
from edge_memllm.overlays.overlay import Edit, Operation, OverlaySpec


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

    def replace(self, tokens: Ids, layers: Ids, rows: Floats) -> None:
        """Replace rows by `rows` [n, D]: that of `tokens[i]` in `layers[i]` by `rows[i]`."""
        self._with_rows(tokens, layers, "replace", rows)

    def replace_stored(self, tokens: Ids, layers: Ids, scales: Bytes, codes: Bytes) -> None:
        """Replace rows by rows that are in this overlay's codec already, bytes [n, ...]."""
        self._columns.extend(tokens, layers, "replace")
        self._append(padded(self._spec, scales, codes))

    def add(self, tokens: Ids, layers: Ids, rows: Floats) -> None:
        """Add `rows` [n, D] to rows."""
        self._with_rows(tokens, layers, "add", rows)

    def scale(self, tokens: Ids, layers: Ids, factor: float) -> None:
        """Multiply n rows by a number."""
        self._columns.extend(tokens, layers, "scale", factor)

    def blank(self, tokens: Ids, layers: Ids) -> None:
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

    def _with_rows(self, tokens: Ids, layers: Ids, operation: Operation, rows: Floats) -> None:
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
