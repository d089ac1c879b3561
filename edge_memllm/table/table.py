"""The table: the records of all tokens, fetched by token id and verified on every read.

Knows the file's layout and its checksums; how bytes get here is a reader's business, and what
they mean a codec's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import (
    CHECKSUM_BYTES,
    Offsets,
    RecordBuffer,
    TableLayout,
    checksum_seed,
    record_checksum,
)
from edge_memllm.artifact.manifest import Manifest
from edge_memllm.artifact.tensor_header import LENGTH, check_header, header_length
from edge_memllm.errors import ArtifactError, CorruptionError, RequestError, StorageError
from edge_memllm.process.forking import ProcessLock
from edge_memllm.readers import Reader, open_reader
from edge_memllm.readers.pread import PreadReader
from edge_memllm.readers.reader import scatter
from edge_memllm.table.source import Fetched, RecordSource

_FREE = -1

Quality: TypeAlias = Literal["full", "coarse"]
QUALITIES: tuple[Quality, ...] = get_args(Quality)


class RecordCache:
    """At most `capacity_bytes` of records of `record_bytes` each. Thread-safe.

    `hot_tokens`, the most frequent first, come in when they are first read and then stay; they get
    half of the slots at most. Raises `RequestError` when there is not even room for one record.
    """

    def __init__(
        self, capacity_bytes: int, record_bytes: int, hot_tokens: Sequence[int] = ()
    ) -> None:
        slots = capacity_bytes // record_bytes
        if slots < 1:
            raise RequestError(
                f"A record cache of {capacity_bytes} bytes was asked for, one record takes "
                f"{record_bytes}. Ask for more, or for 0 to have none."
            )
        self.slots = slots
        hot = list(dict.fromkeys(hot_tokens))[: slots // 2]
        self._reserved = {token: slot for slot, token in enumerate(hot)}
        self._first = self._hand = len(hot)  # the slots from here on are for everybody
        self._record_bytes = record_bytes
        # Not touched before it is filled, so memory is taken as records come in.
        self._arena = np.empty(slots * record_bytes, np.uint8).data
        self._slot_of: dict[int, int] = {}
        self._token_in = [_FREE] * slots
        self._used = bytearray(slots)  # 1: asked for since the hand was here
        self._lock = ProcessLock()

    def __contains__(self, token: int) -> bool:
        return token in self._slot_of

    def load(self, token: int, parts: Sequence[memoryview]) -> bool:
        """Copy the record of `token` into `parts`; return False when it is not here."""
        with self._lock:
            slot = self._slot_of.get(token)
            if slot is None:
                return False
            self._used[slot] = 1
            scatter(self._arena, slot * self._record_bytes, parts)
            return True

    def store(self, token: int, parts: Sequence[memoryview]) -> None:
        """Take in the record of `token`, which must be verified, in place of another if need be."""
        with self._lock:
            if (
                token in self._slot_of or not self._arena
            ):  # another thread stored it, or cleared all
                return
            slot = self._reserved.get(token)
            if slot is None:
                slot = self._free_slot()
            position = slot * self._record_bytes
            for part in parts:
                self._arena[position : position + len(part)] = part
                position += len(part)
            self._token_in[slot] = token
            self._slot_of[token] = slot

    def clear(self) -> None:
        """Forget all records and free the memory; nothing is taken in any more."""
        with self._lock:
            self._slot_of.clear()
            self._arena = memoryview(b"")

    def _free_slot(self) -> int:
        """Return the slot under the hand once its record was let go, and move the hand on."""
        # What comes in has no second turn before it is asked for again, so that a long prompt
        # does not push out what every text uses.
        while self._used[self._hand]:
            self._used[self._hand] = 0
            self._advance()
        slot = self._hand
        self._advance()
        if self._token_in[slot] != _FREE:
            del self._slot_of[self._token_in[slot]]
        return slot

    def _advance(self) -> None:
        self._hand = self._hand + 1 if self._hand + 1 < self.slots else self._first


@dataclass(frozen=True, slots=True)
class TableStatistics:
    """What a table has read since it was opened."""

    records_read: int = 0  # through the reader; not those that were in the record cache
    bytes_read: int = 0  # of records, without padding; from memory when the reader is "ram"
    reads: int = 0  # reads of storage the system was asked for
    cache_hits: int = 0  # records found in the record cache; 0 without one
    cache_misses: int = 0


class Table(RecordSource):
    """The open table of an artifact. Thread-safe, as long as each thread has its own buffer."""

    def __init__(
        self,
        manifest: Manifest,
        where: str,
        layout: TableLayout,
        offsets: Offsets,
        checksums: NDArray[Any],
        reader: Reader,
        cache: RecordCache | None = None,
    ) -> None:
        self.layout = layout  # of what is read: of the front part of records for coarse quality
        self.reader_name = reader.name
        self.reader_reason = reader.reason  # "asked for", or why "auto" chose it
        self._where = where
        self._vocab_size = manifest.model.vocab_size
        self._offsets = offsets
        self._record_bytes = [each.record_bytes for each in layout.kinds]
        self._seed = checksum_seed(manifest.model.identity)
        self._checksums = checksums.data
        self._reader = reader
        self._cache = cache
        self._closed = False
        self._lock = ProcessLock()
        self._records_read = 0
        self._bytes_read = 0
        self._reads = 0
        self._hits = 0

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        reader: str = "auto",
        *,
        record_cache_bytes: int = 0,
        hot_tokens: Sequence[int] = (),
        quality: str = "full",
    ) -> Self:
        """Open the table that the manifest names, and check its header and its checksums.

        `quality` "coarse" reads only the front part of records, where the codec has one. With
        `record_cache_bytes`, records once read are kept in that much memory, those of
        `hot_tokens` (the most frequent first) for good in up to half of it.

        Raises `ArtifactError` when it belongs to another model or export, `CorruptionError` when
        it is damaged, and `RequestError` for a reader that does not exist or does not work here,
        for a quality that the table does not have and for a cache too small for one record.
        """
        manifest, table = artifact.manifest, artifact.manifest.table
        where = str(artifact.path / table.file)
        size = _layout_of(manifest.layout, quality).record_bytes
        cache = None
        if record_cache_bytes:
            cache = RecordCache(record_cache_bytes, size, hot_tokens)
        whole, checksums = _read_checked(artifact.open_file(table.file), manifest, where)
        layout = _layout_of(whole, quality)
        column = 0 if quality == "coarse" else -1
        vocabulary, start = manifest.model.vocab_size, table.records_offset
        offsets = whole.offsets(vocabulary, start)
        region = whole.region(vocabulary, start, layout.record_bytes)
        file = artifact.open_file(table.file)
        opened = open_reader(reader, file, where, region, cached=cache is not None)
        return cls(manifest, where, layout, offsets, checksums[:, column].copy(), opened, cache)

    @property
    def statistics(self) -> TableStatistics:
        """What was read so far."""
        with self._lock:
            records = self._records_read
            misses = 0 if self._cache is None else records
            return TableStatistics(records, self._bytes_read, self._reads, self._hits, misses)

    def locate(self, token: int) -> tuple[int, int]:
        """Return where the record of a token of the vocabulary begins in the file, and its bytes.

        For coarse quality, the bytes of its front part.
        """
        (offset,), (section,) = self._offsets([token])
        return offset, self._record_bytes[section]

    def announce(self, ids: Iterable[int]) -> None:
        """Say that the records of `ids` will be fetched soon.

        Only a hint: it returns at once and may do nothing. Ids that are not in the vocabulary are
        left for `fetch` to refuse.
        """
        if self._closed:
            return
        known = () if self._cache is None else self._cache
        wanted = [each for each in ids if 0 <= each < self._vocab_size and each not in known]
        places: dict[int, list[int]] = {}  # by section
        for offset, section in zip(*self._offsets(wanted), strict=True):
            places.setdefault(section, []).append(offset)
        for section, offsets in places.items():
            self._reader.announce(offsets, self._record_bytes[section])

    def fetch(self, ids: NDArray[np.int64], buffer: RecordBuffer) -> Fetched:
        """Put the record of `ids[i]` into slot i of `buffer`: from the cache, or read and verified.

        What the graph is fed is made from it here, on the thread that reads. `ids` is [U],
        distinct. Returns how much was read from storage. Raises `RequestError` for an id that
        is not in the vocabulary or more ids than the buffer holds, `CorruptionError` for a
        damaged record and `StorageError` when reading fails; the buffer's content is then
        undefined.
        """
        tokens: list[int] = ids.tolist()
        self._check(tokens, buffer)
        offsets, sections = self._offsets(tokens)
        parts = [buffer.parts(slot, section) for slot, section in enumerate(sections)]
        missing = list(range(len(tokens))) if self._cache is None else self._load(tokens, parts)
        missing.sort(key=offsets.__getitem__)  # the order on storage
        reads = 0
        if missing:
            targets = [parts[slot] for slot in missing]
            reads = self._reader.read([offsets[slot] for slot in missing], targets)
        for slot in missing:
            self._take_in(tokens[slot], parts[slot])
        buffer.transcode(len(tokens), sections)
        size = sum([self._record_bytes[sections[slot]] for slot in missing])
        fetched = Fetched(reads, size, [tokens[slot] for slot in missing])
        with self._lock:
            self._records_read += len(missing)
            self._bytes_read += fetched.bytes
            self._reads += reads
            self._hits += len(tokens) - len(missing)
        return fetched

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._closed = True
        self._reader.close()
        if self._cache is not None:
            self._cache.clear()

    def _load(self, tokens: Sequence[int], parts: Sequence[list[memoryview]]) -> list[int]:
        """Fill what slots the cache can; return the others."""
        assert self._cache is not None
        load = self._cache.load
        return [slot for slot, token in enumerate(tokens) if not load(token, parts[slot])]

    def _take_in(self, token: int, parts: list[memoryview]) -> None:
        """Verify a record that was read, and keep a copy if there is a cache."""
        if record_checksum(parts, token, self._seed) != self._checksums[token]:
            raise self._corrupt(token)
        if self._cache is not None:
            self._cache.store(token, parts)

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
            f"{self.locate(token)[0]} does not match its checksum. "
            "The file is damaged; copy the folder again."
        )


def _layout_of(layout: TableLayout, quality: str) -> TableLayout:
    """Return the layout of what is read of each record."""
    if quality not in QUALITIES:
        raise RequestError(f"table_quality is {quality!r}, expected {' or '.join(QUALITIES)}.")
    if quality == "full":
        return layout
    if layout.coarse is None:
        raise RequestError(
            f"table_quality is 'coarse', codec {layout.codec_id} has no coarse part. Use 'full', "
            "or a table whose codec is nested8."
        )
    return layout.coarse


def _read_checked(
    file: int, manifest: Manifest, where: str
) -> tuple[TableLayout, NDArray[np.uint64]]:
    """Check the header; return layout and checksums [V, n] once digests are right."""
    model, table, layout = manifest.model, manifest.table, manifest.layout
    records_end = table.records_offset + layout.records_bytes(model.vocab_size)
    size = model.vocab_size * layout.checksums * CHECKSUM_BYTES
    storage = PreadReader(file, where)
    try:
        first = _read_range(storage, 0, LENGTH.size)
        length = header_length(first, table.records_offset, where)
        header = _read_range(storage, LENGTH.size, length)
        check_header(header, layout, model.vocab_size, model.identity, where)
        checksums = _read_range(storage, records_end, size)
        parameters = _read_range(storage, records_end + size, layout.parameters_bytes)
    finally:
        storage.close()
    _check_digest("checksums", checksums, table.checksums_sha256, where)
    if table.parameters_sha256 is not None:
        _check_digest("parameters", parameters, table.parameters_sha256, where)
    try:
        layout = layout.with_parameters(parameters)
    except ValueError as error:
        raise ArtifactError(f"{where}: {error} Export the model again.") from error
    columns = np.frombuffer(checksums, "<u8").astype(np.uint64)
    return layout, columns.reshape(model.vocab_size, layout.checksums)


def _check_digest(what: str, data: bytes, expected: str, where: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected:
        raise CorruptionError(
            f"{where}: sha256 of the {what} is {digest[:12]}, the manifest says "
            f"{expected[:12]}. The file is damaged; copy the folder again."
        )


def _read_range(storage: PreadReader, offset: int, size: int) -> bytes:
    data = bytearray(size)
    if size:
        storage.read([offset], [[memoryview(data)]])
    return bytes(data)
