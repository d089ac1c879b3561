"""Checking everything an artifact holds, not only what a generation happens to read.

Knows files and records; whether the numbers in them are the checkpoint's is for the exporter's
parity ladder to say.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_memllm.artifact import Artifact
from edge_memllm.errors import CorruptionError
from edge_memllm.readers.pread import PreadReader
from edge_memllm.records import RecordBuffer
from edge_memllm.table import Table

Progress = Callable[[str, int, int], None]

# Bytes of records held at once.
_CHUNK_BYTES = 8 << 20


def verify_artifact(artifact: Artifact, progress: Progress) -> None:
    """Check every file's digest, every record's checksum, and that all padding is zero.

    `progress(stage, done, total)` is called on the way. Raises `ArtifactError`,
    `CorruptionError` or `StorageError` for the first thing that is wrong.
    """
    progress("digests", 0, 1)
    artifact.verify_digests()
    progress("digests", 1, 1)
    _check_records(artifact, progress)
    _check_padding(artifact, progress)


def _check_records(artifact: Artifact, progress: Progress) -> None:
    """Read every record as a generation would."""
    total = artifact.manifest.model.vocab_size
    chunk = _records_at_once(artifact)
    table = Table.open(artifact, "pread")
    try:
        buffer = RecordBuffer(table.layout, min(chunk, total))
        for start in range(0, total, chunk):
            end = min(start + chunk, total)
            table.fetch(np.arange(start, end, dtype=np.int64), buffer)
            progress("records", end, total)
    finally:
        table.close()


def _check_padding(artifact: Artifact, progress: Progress) -> None:
    """Read the bytes behind each record, which no checksum covers; they must be zero."""
    table, total = artifact.manifest.table, artifact.manifest.model.vocab_size
    chunk = _records_at_once(artifact)
    where = str(artifact.path / table.file)
    storage = PreadReader(artifact.open_file(table.file), where)
    try:
        for start in range(0, total, chunk):
            count = min(chunk, total - start)
            data = bytearray(count * table.stride)
            storage.read([table.records_offset + start * table.stride], [[memoryview(data)]])
            records = np.frombuffer(data, np.uint8).reshape(count, table.stride)
            wrong = records[:, table.record_bytes :].any(axis=1)
            if wrong.any():
                raise CorruptionError(
                    f"{where}: the padding behind the record of token {start + wrong.argmax()} is "
                    "not zero. The file is damaged or is not ours; export the model again."
                )
            progress("padding", start + count, total)
    finally:
        storage.close()


def _records_at_once(artifact: Artifact) -> int:
    return max(1, _CHUNK_BYTES // artifact.manifest.table.stride)
