"""Checking everything an artifact holds, not only what a generation happens to read.

Knows files and records; whether the numbers in them are the checkpoint's is for the exporter's
parity ladder to say.
"""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordBuffer, Section
from edge_memllm.errors import CorruptionError
from edge_memllm.progress import Progress
from edge_memllm.readers.pread import PreadReader
from edge_memllm.table.table import Table

# Bytes of records held at once.
_CHUNK_BYTES = 8 << 20


def verify_artifact(artifact: Artifact, progress: Progress) -> None:
    """Check every file's digest, every record's checksums, and that all padding is zero.

    `progress(stage, done, total)` is called on the way. Raises `ArtifactError`,
    `CorruptionError` or `StorageError` for the first thing that is wrong.
    """
    progress("digests", 0, 1)
    artifact.verify_digests()
    progress("digests", 1, 1)
    if artifact.manifest.layout.coarse is not None:
        with closing(Table.open(artifact, "pread", quality="coarse")) as table:
            _check_records(table, artifact, "coarse parts", progress)
    with closing(Table.open(artifact, "pread")) as table:
        _check_records(table, artifact, "records", progress)
        _check_padding(table, artifact, progress)


def _check_records(table: Table, artifact: Artifact, stage: str, progress: Progress) -> None:
    """Read every record as a generation would, in the order of the file."""
    order = _order(table, artifact)
    chunk = _records_at_once(artifact)
    buffer = RecordBuffer(table.layout, min(chunk, len(order)))
    for start in range(0, len(order), chunk):
        ids = order[start : start + chunk]
        table.fetch(ids, buffer)
        progress(stage, start + len(ids), len(order))


def _check_padding(table: Table, artifact: Artifact, progress: Progress) -> None:
    """Read the bytes behind each record, which no checksum covers; they must be zero."""
    spec, order = artifact.manifest.table, _order(table, artifact)
    chunk = _records_at_once(artifact)
    where = str(artifact.path / spec.file)
    with closing(PreadReader(artifact.open_file(spec.file), where)) as storage:
        for section in table.layout.sections(len(order), spec.records_offset):
            for start in range(0, section.count, chunk):
                records = _read_records(storage, section, start, chunk)
                wrong = records[:, section.layout.record_bytes :].any(axis=1)
                if wrong.any():
                    token = order[section.first + start + wrong.argmax()]
                    raise CorruptionError(
                        f"{where}: the padding behind the record of token {token} is not zero. "
                        "The file is damaged or is not ours; export the model again."
                    )
                progress("padding", section.first + start + len(records), len(order))


def _read_records(
    storage: PreadReader, section: Section, start: int, most: int
) -> NDArray[np.uint8]:
    """Return records [n, stride] of a section, padding included."""
    stride = section.layout.stride
    count = min(most, section.count - start)
    data = bytearray(count * stride)
    storage.read([section.start + start * stride], [[memoryview(data)]])
    return np.frombuffer(data, np.uint8).reshape(count, stride)


def _order(table: Table, artifact: Artifact) -> NDArray[np.int64]:
    return table.layout.stored_order(artifact.manifest.model.vocab_size)


def _records_at_once(artifact: Artifact) -> int:
    return max(1, _CHUNK_BYTES // artifact.manifest.table.stride)
