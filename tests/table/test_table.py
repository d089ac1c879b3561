from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.codecs import codec_ids, get_codec
from edge_memllm.errors import CorruptionError, RequestError, StorageError
from edge_memllm.table.table import Table, TableStatistics
from support.ready_codecs import LOW_RANK
from support.small_model import SmallArtifact, write_artifact
from support.tables import LAYOUT, ids, offset_of, patch

# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("codec_id", [*codec_ids(), *LOW_RANK])
@pytest.mark.parametrize("embedding_dtype", ["float16", "float32"])
def test_what_was_written_is_read(
    tmp_path: Path, codec_id: str, embedding_dtype: str, reader: str
) -> None:
    small = write_artifact(
        tmp_path / "written", codec=codec_id, width=256, embedding_dtype=embedding_dtype
    )
    with Artifact.open(small.path) as artifact:
        table = Table.open(artifact, reader)
    wanted = ids(5, 0, 23, 7)
    codec, layers, width = table.layout.codec, table.layout.layers, table.layout.width
    assert codec.parameters_bytes(layers, width) == len(codec.parameters)
    scales, codes = codec.encode(small.rows)
    expected = codec.decode(scales[wanted], codes[wanted], layers, width)
    np.testing.assert_array_equal(table.rows(wanted), expected)
    np.testing.assert_array_equal(
        table.embeddings(wanted), small.embedding[wanted].astype(embedding_dtype)
    )
    buffer = RecordBuffer(table.layout, capacity=6)
    table.fetch(wanted, buffer)
    np.testing.assert_array_equal(buffer.rows(4), expected)
    table.close()


@pytest.mark.parametrize("embedding_dtype", ["float16", "float32"])
@pytest.mark.parametrize("codec_id", ["none", "f16", "int8-g32"])
@pytest.mark.parametrize("embedding_codec", ["int8-g32", "int6-g64", "int4a-g32", "bf16"])
def test_embeddings_have_a_codec_of_their_own(
    tmp_path: Path, embedding_codec: str, codec_id: str, embedding_dtype: str, reader: str
) -> None:
    small = write_artifact(
        tmp_path / "written",
        codec=codec_id,
        embedding_codec=embedding_codec,
        embedding_dtype=embedding_dtype,
    )
    with Artifact.open(small.path) as artifact:
        assert artifact.manifest.table.embedding_codec == embedding_codec
        table = Table.open(artifact, reader, record_cache_bytes=2048)
    wanted = ids(5, 0, 23, 7)
    codec = get_codec(embedding_codec)
    decoded = codec.decode(*codec.encode(small.embedding[wanted, None]), 1, 64)[:, 0]
    expected = decoded.astype(embedding_dtype)
    for _ in range(2):  # from storage, then some from the cache
        np.testing.assert_array_equal(table.embeddings(wanted), expected.astype(np.float32))
    buffer = RecordBuffer(table.layout, capacity=6)
    table.fetch(wanted, buffer)
    assert buffer.embedding(4).dtype == embedding_dtype
    np.testing.assert_array_equal(buffer.embedding(4), expected)
    (chunk,) = table.chunks(wanted)
    np.testing.assert_array_equal(chunk[0], expected.astype(np.float32))
    rows = table.layout.codec
    stored = rows.decode(*rows.encode(small.rows[wanted]), table.layout.layers, table.layout.width)
    np.testing.assert_array_equal(table.rows(wanted), stored)
    table.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(st.integers(0, 23), max_size=24, unique=True))
def test_any_ids_in_any_order(table: Table, small: SmallArtifact, wanted: list[int]) -> None:
    np.testing.assert_array_equal(
        table.embeddings(ids(*wanted)), small.embedding[wanted].astype(np.float16)
    )


@pytest.mark.parametrize("record_cache", [0, 4096])
def test_records_may_lie_closer_than_blocks_of_storage(
    tmp_path: Path, record_cache: int, reader: str
) -> None:
    small = write_artifact(
        tmp_path / "close", codec="none", embedding_codec="int8-g32", vocab_size=600, alignment=64
    )
    assert small.manifest.table.stride == 128
    with Artifact.open(small.path) as artifact:
        table = Table.open(artifact, reader, record_cache_bytes=record_cache)
    every = np.random.default_rng(2).permutation(600)
    form = table.layout.embedding
    expected = form.decode(form.encode(small.embedding)).astype(np.float32)
    for wanted in (*np.split(every, 6), every[:1]):
        table.announce(wanted.tolist())
        np.testing.assert_array_equal(table.embeddings(wanted), expected[wanted])
    table.close()


def test_statistics_count_what_was_read(table: Table) -> None:
    assert table.statistics == TableStatistics(0, 0, 0, 0, 0)
    table.rows(ids(3, 1, 4))
    table.rows(ids(1))
    reads = 0 if table.reader_name == "ram" else 4
    assert table.statistics == TableStatistics(4, 4 * LAYOUT.record_bytes, reads, 0, 0)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (ids(-1), "Token id -1 is not in the vocabulary, ids go from 0 to 23"),
        (ids(0, 24), "Token id 24 is not in the vocabulary"),
        (ids(1, -(1 << 63), 2), "Token id -9223372036854775808 is not in the vocabulary"),
        (ids((1 << 63) - 1), "Token id 9223372036854775807 is not in the vocabulary"),
        (ids(1, 2, 3, 4), "4 records asked for, the buffer holds 3"),
    ],
)
def test_refuses_ids_it_cannot_serve(table: Table, wanted: np.ndarray, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        table.fetch(wanted, RecordBuffer(table.layout, 3))


def test_reader_and_its_reason_are_told(small: SmallArtifact) -> None:
    with Artifact.open(small.path) as artifact:
        asked, chosen = Table.open(artifact, "ram"), Table.open(artifact)
    assert (asked.reader_name, asked.reader_reason) == ("ram", "asked for")
    assert chosen.reader_name == "pread"
    assert "the table is small" in chosen.reader_reason
    asked.close()
    chosen.close()


def test_closed_table_says_so(table: Table) -> None:
    table.close()
    table.close()
    with pytest.raises(StorageError, match=r"table.safetensors: the table is closed"):
        table.rows(ids(1))


def test_folder_may_be_replaced_while_open(small: SmallArtifact, tmp_path: Path) -> None:
    with Artifact.open(small.path) as artifact:
        small.path.rename(tmp_path / "old")
        write_artifact(small.path, seed=1)
        table = Table.open(artifact)
        artifact.verify_digests()
    np.testing.assert_array_equal(table.embeddings(ids(9)), small.embedding[[9]].astype("f2"))
    table.close()


# --- damage ----------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_record_is_detected(small: SmallArtifact) -> None:
    token = 17
    start = offset_of(small, token)
    record = small.table.read_bytes()[start : start + LAYOUT.record_bytes]
    match = f"table.safetensors: the record of token {token} at byte {start} does not match its"
    with Artifact.open(small.path) as artifact:
        table = Table.open(artifact)
    buffer = RecordBuffer(table.layout, 24)
    for bit in range(len(record) * 8):
        patch(small.table, start + bit // 8, bytes([record[bit // 8] ^ 1 << bit % 8]))
        with pytest.raises(CorruptionError, match=match):
            table.fetch(ids(token), buffer)
        patch(small.table, start + bit // 8, record[bit // 8 :][:1])
    table.fetch(np.arange(24), buffer)
    table.close()


def test_every_pair_of_swapped_records_is_detected(small: SmallArtifact, reader: str) -> None:
    content = small.table.read_bytes()
    record = [content[offset_of(small, token) :][: LAYOUT.stride] for token in range(24)]
    for token in range(1, 24):
        patch(small.table, offset_of(small, 0), record[token])
        patch(small.table, offset_of(small, token), record[0])
        with Artifact.open(small.path) as artifact:
            table = Table.open(artifact, reader)
        for wrong in (0, token):
            with pytest.raises(CorruptionError, match=f"the record of token {wrong} at byte"):
                table.embeddings(ids(wrong))
        table.close()
        patch(small.table, offset_of(small, 0), content[offset_of(small, 0) :])


def test_record_of_another_model_in_the_same_place_is_detected(
    small: SmallArtifact, tmp_path: Path
) -> None:
    # Same rows, another identity: the bytes of the record would be fine, so it is the checksum
    # that must differ.
    other = write_artifact(tmp_path / "other", identity="sha256:" + "7" * 64)
    mine, theirs = small.table.read_bytes(), other.table.read_bytes()
    end = offset_of(small, 24)
    assert mine[4096:end] == theirs[4096:end]
    assert not set(struct.unpack("<24Q", mine[end:])) & set(struct.unpack("<24Q", theirs[end:]))


def test_padding_is_not_read(small: SmallArtifact, table: Table) -> None:
    patch(small.table, offset_of(small, 3) + LAYOUT.record_bytes, b"x")
    table.rows(ids(3))


def test_file_cut_short_while_open(small: SmallArtifact) -> None:
    with Artifact.open(small.path) as artifact:
        table = Table.open(artifact)
    os.truncate(small.table, offset_of(small, 10))
    table.rows(ids(9))
    with pytest.raises(StorageError, match=r"table.safetensors: the file ends at .* cut short"):
        table.rows(ids(9, 10))
    table.close()


def test_device_error_at_any_read_leaves_the_table_usable(
    small: SmallArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Artifact.open(small.path) as artifact:
        table = Table.open(artifact)
    real = os.preadv
    for failing in range(24):
        left = failing

        def preadv(file: int, parts: list[memoryview], offset: int) -> int:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(file, parts, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(StorageError, match=r"failed \(Input/output error\). Check the storage"):
            table.rows(np.arange(24))
        monkeypatch.setattr(os, "preadv", real)
        np.testing.assert_array_equal(table.embeddings(ids(0)), small.embedding[:1].astype("f2"))
    table.close()
