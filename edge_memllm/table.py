"""The table: the records of all tokens, fetched by token id and verified on every read.

Knows the file's layout and its checksums; how bytes get here is a reader's business, and what
they mean a codec's.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact import Artifact
from edge_memllm.codecs.codec import Floats
from edge_memllm.errors import CorruptionError, RequestError, StorageError
from edge_memllm.manifest import CHECKSUM_BYTES, Manifest
from edge_memllm.readers import Reader, open_reader
from edge_memllm.readers.pread import PreadReader
from edge_memllm.records import RecordBuffer, checksum_seed, record_checksum
from edge_memllm.table_header import LENGTH, check_header, header_length


@dataclass(frozen=True, slots=True)
class TableStatistics:
    """What a table has read since it was opened."""

    records_read: int = 0
    bytes_read: int = 0  # of records, without padding; from memory when the reader is "ram"
    reads: int = 0  # calls that read from storage


class Table:
    """The open table of an artifact. Thread-safe, as long as each thread has its own buffer."""

    def __init__(self, manifest: Manifest, where: str, checksums: NDArray[Any], reader: Reader):
        self.layout = manifest.layout
        self.reader_name = reader.name
        self._where = where
        self._vocab_size = manifest.model.vocab_size
        self._start = manifest.table.records_offset
        self._stride = manifest.table.stride
        self._record_bytes = manifest.table.record_bytes
        self._seed = checksum_seed(manifest.model.identity)
        self._checksums = checksums.data
        self._reader = reader
        self._closed = False
        self._lock = threading.Lock()
        self._records_read = 0
        self._reads = 0

    @classmethod
    def open(cls, artifact: Artifact, reader: str = "auto") -> Self:
        """Open the table that the manifest names, and check its header and its checksums.

        Raises `ArtifactError` when it belongs to another model or export, `CorruptionError` when
        it is damaged, and `RequestError` for a reader that does not exist.
        """
        manifest = artifact.manifest
        where = str(artifact.path / manifest.table.file)
        checksums = _read_checked(artifact.open_file(manifest.table.file), manifest, where)
        size = manifest.model.vocab_size * manifest.table.stride
        file = artifact.open_file(manifest.table.file)
        opened = open_reader(reader, file, where, manifest.table.records_offset, size)
        return cls(manifest, where, checksums, opened)

    @property
    def statistics(self) -> TableStatistics:
        """What was read so far."""
        with self._lock:
            records = self._records_read
            return TableStatistics(records, records * self._record_bytes, self._reads)

    def fetch(self, ids: NDArray[np.int64], buffer: RecordBuffer) -> int:
        """Read the record of `ids[i]` into slot i of `buffer`, and verify it.

        `ids` is [U], distinct. Returns the number of calls that read from storage. Raises
        `RequestError` for an id that is not in the vocabulary or more ids than the buffer holds,
        `CorruptionError` for a damaged record and `StorageError` when reading fails; the buffer's
        content is then undefined.
        """
        tokens: list[int] = ids.tolist()
        self._check(tokens, buffer)
        slots = sorted(range(len(tokens)), key=tokens.__getitem__)  # the order on storage
        offsets = [self._start + tokens[slot] * self._stride for slot in slots]
        reads = self._reader.read(offsets, [buffer.parts(slot) for slot in slots])
        for slot, token in enumerate(tokens):
            if record_checksum(buffer.parts(slot), token, self._seed) != self._checksums[token]:
                raise self._corrupt(token)
        with self._lock:
            self._records_read += len(tokens)
            self._reads += reads
        return reads

    def rows(self, ids: NDArray[np.int64]) -> Floats:
        """Return the decoded memory rows of `ids` [U] as float32 [U, L, D]. Raises as `fetch`."""
        return self._fetch_new(ids).rows(len(ids))

    def embeddings(self, ids: NDArray[np.int64]) -> Floats:
        """Return the embeddings of `ids` [U] as float32 [U, D]. Raises as `fetch`."""
        return self._fetch_new(ids).embedding(len(ids)).astype(np.float32)

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._closed = True
        self._reader.close()

    def _fetch_new(self, ids: NDArray[np.int64]) -> RecordBuffer:
        buffer = RecordBuffer(self.layout, len(ids))
        self.fetch(ids, buffer)
        return buffer

    def _check(self, tokens: Sequence[int], buffer: RecordBuffer) -> None:
        if self._closed:
            raise StorageError(f"{self._where}: the table is closed.")
        if len(tokens) > buffer.capacity:
            raise RequestError(
                f"{len(tokens)} records asked for, the buffer holds {buffer.capacity}."
            )
        # Checked here because indexing would quietly take -1 for the last token.
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self._vocab_size)
            raise RequestError(
                f"Token id {wrong} is not in the vocabulary, ids go from 0 to "
                f"{self._vocab_size - 1}."
            )

    def _corrupt(self, token: int) -> CorruptionError:
        return CorruptionError(
            f"{self._where}: the record of token {token} at byte "
            f"{self._start + token * self._stride} does not match its checksum. "
            "The file is damaged; copy the folder again."
        )


def _read_checked(file: int, manifest: Manifest, where: str) -> NDArray[np.uint64]:
    """Check the header, and return the checksums [V] once their digest is right."""
    model, table = manifest.model, manifest.table
    records_end = table.records_offset + model.vocab_size * table.stride
    storage = PreadReader(file, where)
    try:
        first = _read_range(storage, 0, LENGTH.size)
        length = header_length(first, table.records_offset, where)
        header = _read_range(storage, LENGTH.size, length)
        check_header(header, manifest.layout, model.vocab_size, model.identity, where)
        checksums = _read_range(storage, records_end, model.vocab_size * CHECKSUM_BYTES)
    finally:
        storage.close()
    digest = hashlib.sha256(checksums).hexdigest()
    if digest != table.checksums_sha256:
        raise CorruptionError(
            f"{where}: sha256 of the checksums is {digest[:12]}, the manifest says "
            f"{table.checksums_sha256[:12]}. The file is damaged; copy the folder again."
        )
    return np.frombuffer(checksums, "<u8").astype(np.uint64)


def _read_range(storage: PreadReader, offset: int, size: int) -> bytes:
    data = bytearray(size)
    storage.read([offset], [[memoryview(data)]])
    return bytes(data)
