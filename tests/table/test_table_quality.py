"""One table of two qualities: the front part of nested8 records read alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.errors import CorruptionError, RequestError
from edge_memllm.table.table import Table
from support.small_model import SmallArtifact, flip, write_artifact

EVERY = np.arange(24)


@pytest.fixture
def small(tmp_path: Path) -> SmallArtifact:
    return write_artifact(tmp_path / "artifact", codec="nested8-g32")


def opened(small: SmallArtifact, quality: str, **options: int) -> Table:
    with Artifact.open(small.path) as artifact:
        cache = options.get("record_cache_bytes", 0)
        return Table.open(artifact, "pread", quality=quality, record_cache_bytes=cache)


@pytest.fixture
def tables(small: SmallArtifact) -> Iterator[tuple[Table, Table]]:
    both = opened(small, "full"), opened(small, "coarse")
    yield both
    for table in both:
        table.close()


def test_coarse_reads_less_and_is_less_exact(
    small: SmallArtifact, tables: tuple[Table, Table]
) -> None:
    full, coarse = tables
    errors = [np.abs(table.rows(EVERY) - small.rows).max() for table in tables]
    assert 8 * errors[0] < errors[1] < 24 * errors[0]
    for table in tables:
        codec = table.layout.codec
        assert (np.abs(table.rows(EVERY) - small.rows) <= codec.bound(small.rows)).all()
        np.testing.assert_array_equal(table.embeddings(EVERY), small.embedding.astype("f2"))
    assert full.layout.record_bytes - coarse.layout.record_bytes == 2 * 64 // 2
    assert coarse.statistics.bytes_read == 72 * coarse.layout.record_bytes  # all, three times


def test_both_feed_the_same_graph(tables: tuple[Table, Table]) -> None:
    fed = []
    for table in tables:
        buffer = RecordBuffer(table.layout, 24)
        table.fetch(EVERY, buffer)
        fed.append(buffer.wire(24))
    full, coarse = fed
    np.testing.assert_array_equal(full["memory_scales"], coarse["memory_scales"])
    apart = full["memory_codes"].astype(int) - coarse["memory_codes"]
    assert (apart.min(), apart.max()) == (-8, 7)
    assert not (coarse["memory_codes"] % 16).any()


def test_each_quality_notices_damage_to_what_it_reads(
    small: SmallArtifact, tables: tuple[Table, Table]
) -> None:
    spec, (full, coarse) = small.manifest.table, tables
    start = spec.records_offset + 5 * spec.stride
    five = EVERY[5:6]
    for place in range(spec.record_bytes):
        flip(small.table, start + place)
        with pytest.raises(CorruptionError, match="the record of token 5 at byte"):
            full.rows(five)
        if place < coarse.layout.record_bytes:
            with pytest.raises(CorruptionError, match="the record of token 5 at byte"):
                coarse.rows(five)
        else:
            coarse.rows(five)
        flip(small.table, start + place)
    full.rows(EVERY)


def test_the_record_cache_holds_what_was_read(small: SmallArtifact) -> None:
    expected = opened(small, "coarse")
    size = expected.layout.record_bytes
    table = opened(small, "coarse", record_cache_bytes=24 * size)
    for _ in range(2):
        np.testing.assert_array_equal(table.rows(EVERY), expected.rows(EVERY))
    assert (table.statistics.cache_hits, table.statistics.records_read) == (24, 24)
    for each in (table, expected):
        each.close()


def test_other_qualities_and_codecs_are_refused(small: SmallArtifact, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="table_quality is 'best', expected full or coarse"):
        opened(small, "best")
    plain = write_artifact(tmp_path / "plain", codec="int8-g32")
    with pytest.raises(RequestError, match=r"codec int8-g32 has no coarse part\. Use 'full', or a"):
        opened(plain, "coarse")
