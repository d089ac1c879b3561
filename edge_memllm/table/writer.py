"""Writes a table file: header, records in chunks, checksums. Memory stays at a chunk or two.

The same rows give the same bytes. Space is claimed before anything is written, and bytes go out
front to back, so the file's digest is known as soon as the last one is written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from xxhash import xxh3_64_intdigest

from edge_memllm.arrays import Bytes, Floats, Ids
from edge_memllm.artifact.atomic import reason, write_all
from edge_memllm.artifact.layout import RecordLayout, TableLayout, checksum_seed
from edge_memllm.artifact.manifest import FileSpec, TableSpec
from edge_memllm.artifact.tensor_header import build_header
from edge_memllm.codecs import Codec, EmbeddingForm, UnencodableRowError
from edge_memllm.errors import ExportError

_FLAGS = (
    os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
# What posix_fallocate says where the file system cannot claim space; writing then finds out.
_CANNOT_CLAIM = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# The bytes [N, embedding_bytes] that a record holds for embeddings of tokens [N], where they are
# known already: to encode decoded ones again would move them to another grid.
StoredEmbeddings = Callable[[Ids], Bytes]
# Those of memory rows of tokens [N]: scales [N, scales_bytes] and codes [N, codes_bytes].
StoredRows = Callable[[Ids], tuple[Bytes, Bytes]]


class TableWriter:
    """Writes the records of all tokens in their stored order: `append` until done, then `finish`.

    That order is `layout.stored_order`: 0, 1, 2, ... unless there are classes of tokens.

    The codec of `layout` has its parameters already, if it needs some; with `search` it looks for
    the best scales (see `Codec.encode`). `stored` gives the bytes of embeddings, `stored_rows`
    those of memory rows; both are compared with what is appended. Use it in a with-statement,
    which removes a file that was not finished. Raises `ExportError` when `path` exists, the file
    does not fit on the disk or there is nothing to search for.
    """

    def __init__(
        self,
        path: Path,
        layout: TableLayout,
        vocab_size: int,
        identity: str,
        *,
        search: bool = False,
        stored: StoredEmbeddings | None = None,
        stored_rows: StoredRows | None = None,
    ) -> None:
        if search and not layout.searches:
            raise ExportError(f"{path}: codec {layout.codec_id} has no scales to search for.")
        self._path = path
        self._layout = layout
        self._header = build_header(layout, vocab_size, identity)
        self._seed = checksum_seed(identity)
        self._search = search
        self._stored = stored
        self._stored_rows = stored_rows
        self._tokens = layout.stored_order(vocab_size)
        self._sections = list(layout.sections(vocab_size, len(self._header)))
        self._checksums = np.zeros((vocab_size, layout.checksums), "<u8")
        self._count = 0
        self._finished = False
        self._digest = hashlib.sha256()
        self._background = ThreadPoolExecutor(1)  # digests and writes while the next are encoded
        self._writing: Future[None] | None = None
        self._size = len(self._header) + layout.table_bytes(vocab_size)
        try:
            self._file = os.open(path, _FLAGS, 0o666)
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._claim_space()
            self._write(self._header)
        except BaseException:
            self._abandon()
            raise

    def append(self, embedding: Floats, rows: Floats) -> None:
        """Write the next N records, from embedding [N, D] and rows [N, L, W].

        Raises `ExportError` naming token and layer when a value is NaN, infinite or too large.
        Writing goes on in the background: that the disk is full is said by the next call, or by
        `finish`.
        """
        self._check_shapes(embedding, rows)
        start = 0
        while start < len(rows):
            section = next(each for each in self._sections if self._count < each.first + each.count)
            end = start + section.first + section.count - self._count
            self._append(section.layout, embedding[start:end], rows[start:end])
            start = end

    def finish(self) -> tuple[TableSpec, FileSpec]:
        """Write checksums and parameters, force everything to the disk, and describe the file.

        Raises `ExportError` unless every token has its record.
        """
        if self._count != len(self._checksums):
            raise ExportError(
                f"{self._path}: {self._count} records written, expected {len(self._checksums)}."
            )
        self._wait()
        self._write(self._checksums.view(np.uint8).data)
        self._write(self._layout.parameters)
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failure(error) from error
        self._finished = True
        return self._table_spec(), FileSpec(self._size, self._digest.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._background.shutdown()
        if self._finished:
            os.close(self._file)
        else:
            self._abandon()

    def _append(self, layout: RecordLayout, embedding: Floats, rows: Floats) -> None:
        """Write records that are alike."""
        records = self._encode(layout, embedding, rows)
        tokens = self._tokens[self._count : self._count + len(records)].tolist()
        for column, size in enumerate(_checked(layout)):
            for token, record in zip(tokens, records[:, :size], strict=True):
                checksum = xxh3_64_intdigest(record, seed=self._seed ^ token)
                self._checksums[token, column] = checksum
        self._wait()
        self._writing = self._background.submit(self._write, records.reshape(-1).data)
        self._count += len(records)

    def _wait(self) -> None:
        """Wait for what is being written. Raises `ExportError` if it could not be."""
        if self._writing is not None:
            self._writing.result()

    def _claim_space(self) -> None:
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._file, 0, self._size)
        except OSError as error:
            if error.errno not in _CANNOT_CLAIM:
                raise self._failure(error) from error

    def _check_shapes(self, embedding: Floats, rows: Floats) -> None:
        layout, count = self._layout, len(embedding)
        expected = ((count, layout.embedding_width), (count, layout.layers, layout.width))
        if (embedding.shape, rows.shape) != expected:
            raise ExportError(
                f"{self._path}: embedding {embedding.shape} and rows {rows.shape}, "
                f"expected {expected[0]} and {expected[1]}."
            )
        if self._count + count > len(self._checksums):
            raise ExportError(
                f"{self._path}: {self._count + count} records, expected {len(self._checksums)}."
            )

    def _encode(self, layout: RecordLayout, embedding: Floats, rows: Floats) -> Bytes:
        """Return whole records [N, stride], padding included."""
        stored = self._encode_embedding(layout.embedding, embedding)
        scales, codes = self._encode_rows(layout.codec, rows)
        padding = np.zeros((len(rows), layout.stride - layout.record_bytes), np.uint8)
        return np.concatenate([stored, scales, codes, padding], axis=1)

    def _encode_rows(self, codec: Codec, rows: Floats) -> tuple[Bytes, Bytes]:
        if self._stored_rows is None:
            try:
                # A class of tokens may have a codec without scales to search for.
                return codec.encode(rows, search=self._search and codec.searches)
            except UnencodableRowError as error:
                raise self._unencodable(error, f"memory row of layer {error.layer}") from error
        tokens = self._tokens[self._count : self._count + len(rows)]
        scales, codes = self._stored_rows(tokens)
        with np.errstate(invalid="ignore"):  # an infinite scale is found below
            decoded = codec.decode(scales, codes, *rows.shape[1:])
        within = np.abs(decoded - rows) <= codec.bound(rows)
        if not within.all():
            row, layer, _ = np.argwhere(~within)[0].tolist()
            raise ExportError(
                f"{self._path}: token {tokens[row]}, memory row of layer {layer}: it is stored as "
                "another than the network's, or too large for float16. Choose another table codec."
            )
        return scales, codes

    def _encode_embedding(self, form: EmbeddingForm, embedding: Floats) -> Bytes:
        if self._stored is None:
            try:
                return form.encode(embedding)
            except UnencodableRowError as error:
                raise self._unencodable(error, "embedding") from error
        tokens = self._tokens[self._count : self._count + len(embedding)]
        stored = self._stored(tokens)
        within = np.abs(form.decode(stored) - embedding) <= form.bound(embedding)
        if not within.all():
            token = tokens[int(np.argwhere(~within)[0, 0])]
            raise ExportError(
                f"{self._path}: token {token}: its embedding is stored as another than the "
                f"network's, or too large for {form.dtype}. Choose another embedding codec."
            )
        return stored

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        try:
            write_all(self._file, data)
        except OSError as error:
            raise self._failure(error) from error

    def _table_spec(self) -> TableSpec:
        layout, parameters = self._layout, self._layout.parameters
        return TableSpec(
            file=self._path.name,
            codec=layout.codec_id,
            embedding_dtype=layout.embedding_dtype,
            embedding_codec=layout.embedding.codec.id,
            record_bytes=layout.record_bytes,
            stride=layout.stride,
            alignment=layout.alignment,
            records_offset=len(self._header),
            checksums_sha256=hashlib.sha256(self._checksums.data).hexdigest(),
            parameters_sha256=hashlib.sha256(parameters).hexdigest() if parameters else None,
            classes=layout.classes or None,
        )

    def _abandon(self) -> None:
        with suppress(OSError):  # nothing of it is to stay, so nothing of it can be lost
            os.close(self._file)
        with suppress(OSError):
            self._path.unlink()

    def _unencodable(self, error: UnencodableRowError, what: str) -> ExportError:
        return ExportError(
            f"{self._path}: token {self._tokens[self._count + error.row]}, {what}: {error.reason}. "
            "Check the checkpoint, or choose another codec."
        )

    def _failure(self, error: OSError) -> ExportError:
        if error.errno in _FULL:
            free = shutil.disk_usage(self._path.parent).free
            return ExportError(
                f"{self._path}: the disk is full. The table needs {self._size} bytes, "
                f"{free} are free. Free some space or export to another disk."
            )
        return ExportError(f"{self._path}: writing failed ({reason(error)}). Check the disk.")


def _checked(layout: RecordLayout) -> tuple[int, ...]:
    """Return how many bytes from the start of a record each of its checksums covers."""
    coarse = layout.coarse
    return (layout.record_bytes,) if coarse is None else (coarse.record_bytes, layout.record_bytes)
