from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from edge_memllm.artifact.layout import RecordLayout
from edge_memllm.codecs import get_codec
from edge_memllm.errors import ExportError
from edge_memllm.table.writer import TableWriter
from support.small_model import IDENTITY, SmallArtifact

LAYOUT = RecordLayout(2, 64, get_codec("int8-g32"), "float16", 512)


def write_table(path: Path, chunk: int = 24, layout: RecordLayout = LAYOUT) -> bytes:
    random = np.random.default_rng(0)
    embedding = random.standard_normal((24, layout.width)).astype(np.float32)
    rows = random.standard_normal((24, layout.layers, layout.width)).astype(np.float32)
    with TableWriter(path, layout, 24, IDENTITY) as writer:
        for start in range(0, 24, chunk):
            writer.append(embedding[start : start + chunk], rows[start : start + chunk])
        _, spec = writer.finish()
    content = path.read_bytes()
    assert (spec.bytes, spec.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    return content


def test_bytes_are_the_same_whatever_the_chunks(tmp_path: Path) -> None:
    whole = write_table(tmp_path / "whole")
    assert write_table(tmp_path / "again") == whole
    assert write_table(tmp_path / "chunks", chunk=7) == whole


@pytest.mark.parametrize("alignment", [512, 4096, 16384])
def test_layout_of_the_file(tmp_path: Path, alignment: int) -> None:
    layout = dataclasses.replace(LAYOUT, alignment=alignment)
    content = write_table(tmp_path / "table", layout=layout)
    start = max(4096, alignment)
    assert struct.unpack("<Q", content[:8]) == (start - 8,)
    header = json.loads(content[8:start])
    assert header["__metadata__"] == {
        "format": "edge-memllm-table",
        "format_version": "1",
        "identity": IDENTITY,
        "codec": "int8-g32",
        "embedding_dtype": "float16",
        "layers": "2",
        "width": "64",
        "alignment": str(alignment),
    }
    assert content[8:start] == json.dumps(
        header, sort_keys=True, separators=(",", ":")
    ).encode().ljust(start - 8)
    records = np.frombuffer(content, np.uint8, 24 * alignment, start).reshape(24, alignment)
    assert not records[:, layout.record_bytes :].any()
    assert len(content) == start + 24 * (alignment + 8)


def test_safetensors_reads_it(small: SmallArtifact) -> None:
    content = small.table.read_bytes()
    with safe_open(small.table, framework="numpy") as file:
        records, checksums = file.get_tensor("records"), file.get_tensor("checksums")
        assert file.metadata()["identity"] == IDENTITY
    assert (records.dtype, records.shape) == (np.uint8, (24, 512))
    assert (checksums.dtype, checksums.shape) == (np.uint64, (24,))
    assert records.tobytes() + checksums.tobytes() == content[4096:]
    digest = hashlib.sha256(checksums.tobytes()).hexdigest()
    assert digest == small.manifest.table.checksums_sha256


@pytest.mark.parametrize("where", ["embedding", "rows"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_refuses_values_that_cannot_be_stored(tmp_path: Path, where: str, value: float) -> None:
    path = tmp_path / "table"
    embedding = np.zeros((8, 64), np.float32)
    rows = np.zeros((8, 2, 64), np.float32)
    match where:
        case "embedding":
            embedding[5, 3], named = value, "token 13, embedding"
        case "rows":
            rows[5, 1, 3], named = value, "token 13, memory row of layer 1"
    with TableWriter(path, LAYOUT, 24, IDENTITY) as writer:
        writer.append(np.zeros((8, 64), np.float32), np.zeros((8, 2, 64), np.float32))
        with pytest.raises(ExportError, match=rf"{named}: .* cannot be stored, .* Check the che"):
            writer.append(embedding, rows)
    assert not path.exists()


def test_rows_whose_bytes_are_known_are_written_as_they_are(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    embedding = np.zeros((24, 64), np.float32)
    scales = random.random((24, 4)).astype("<f2").view(np.uint8)
    codes = random.integers(0, 256, (24, 128), dtype=np.uint8)  # 0 is none that the codec chooses
    rows = LAYOUT.codec.decode(scales, codes, 2, 64)
    asked = []

    def stored(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked.extend(tokens.tolist())
        return scales[tokens], codes[tokens]

    with TableWriter(tmp_path / "table", LAYOUT, 24, IDENTITY, stored_rows=stored) as writer:
        writer.append(embedding[:7], rows[:7])
        writer.append(embedding[7:], rows[7:])
        writer.finish()
    assert asked == list(range(24))
    content = np.frombuffer((tmp_path / "table").read_bytes(), np.uint8, 24 * 512, 4096)
    records = content.reshape(24, 512)[:, 128 : LAYOUT.record_bytes]
    np.testing.assert_array_equal(records, np.concatenate([scales, codes], axis=1))


@pytest.mark.parametrize("stored", [1.0, np.inf])
def test_refuses_bytes_of_rows_that_are_not_the_networks(tmp_path: Path, stored: float) -> None:
    rows = np.zeros((3, 2, 64), np.float32)
    scales, codes = LAYOUT.codec.encode(rows)
    scales.view("<f2")[1, 3], codes[1, 100] = stored, 130
    with (
        TableWriter(
            tmp_path / "table",
            LAYOUT,
            3,
            IDENTITY,
            stored_rows=lambda tokens: (scales[tokens], codes[tokens]),
        ) as writer,
        pytest.raises(ExportError, match=r"token 1, memory row of layer 1: it is stored as"),
    ):
        writer.append(np.zeros((3, 64), np.float32), rows)


def test_refuses_other_shapes_and_counts(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "table", LAYOUT, 3, IDENTITY) as writer:
        with pytest.raises(ExportError, match=r"embedding \(2, 32\) .* expected \(2, 64\)"):
            writer.append(np.zeros((2, 32), np.float32), np.zeros((2, 2, 64), np.float32))
        with pytest.raises(ExportError, match=r"rows \(1, 2, 64\), expected .* \(2, 2, 64\)"):
            writer.append(np.zeros((2, 64), np.float32), np.zeros((1, 2, 64), np.float32))
        with pytest.raises(ExportError, match="table: 4 records, expected 3"):
            writer.append(np.zeros((4, 64), np.float32), np.zeros((4, 2, 64), np.float32))
        writer.append(np.zeros((2, 64), np.float32), np.zeros((2, 2, 64), np.float32))
        with pytest.raises(ExportError, match="table: 2 records written, expected 3"):
            writer.finish()


def test_never_overwrites_and_never_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with pytest.raises(RuntimeError, match="stop"), TableWriter(path, LAYOUT, 3, IDENTITY):
        assert path.exists()
        raise RuntimeError("stop")
    assert not path.exists()
    path.write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"table: writing failed \(File exists\)"):
        TableWriter(path, LAYOUT, 3, IDENTITY)
    assert path.read_bytes() == b"mine"


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


NEEDED = 4096 + 24 * 520
DISK_FULL = rf"table: the disk is full. The table needs {NEEDED} bytes, \d+ are free. Free some"


def test_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "write", pytest.fail)
    with pytest.raises(ExportError, match=DISK_FULL):
        TableWriter(tmp_path / "table", LAYOUT, 24, IDENTITY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_works_where_space_cannot_be_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    def fallocate(*_: object) -> None:
        raise OSError(error, "not here")

    expected = write_table(tmp_path / "claimed")
    if error is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert write_table(tmp_path / "not claimed") == expected


def test_claiming_space_may_fail_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fallocate(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(ExportError, match=r"table: writing failed \(Input/output error\)"):
        TableWriter(tmp_path / "table", LAYOUT, 24, IDENTITY)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_the_nth_call_fails_for_every_n(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path, real = tmp_path / "table", getattr(os, call)
    failures = 0
    for failing in range(100):
        left = failing

        def sometimes(*arguments: object) -> object:
            nonlocal left
            left -= 1
            return full() if left == -1 else real(*arguments)

        monkeypatch.setattr(os, call, sometimes)
        try:
            write_table(path, chunk=6)
            break
        except ExportError as error:
            assert "the disk is full" in str(error)
            assert not path.exists()
            failures += 1
    assert failures == {"write": 1 + 4 + 1, "fsync": 1}[call]  # header, four chunks, checksums
    assert path.exists()


@pytest.mark.parametrize("most", [7, 1000])
def test_short_writes_are_continued(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, real = write_table(tmp_path / "whole"), os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data)[:most]))
    assert write_table(tmp_path / "pieces") == expected


@pytest.fixture
def one_megabyte(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; only root can make one."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs Linux, root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("claim", [True, False])
def test_a_disk_that_is_really_full(
    one_megabyte: Path, monkeypatch: pytest.MonkeyPatch, claim: bool
) -> None:
    if not claim:
        monkeypatch.delattr(os, "posix_fallocate")
    rows = np.zeros((4096, 2, 64), np.float32)
    match = r"the disk is full. The table needs 2134016 bytes, \d+ are free"
    with (
        pytest.raises(ExportError, match=match),
        TableWriter(one_megabyte / "table", LAYOUT, 4096, IDENTITY) as writer,
    ):
        writer.append(rows[:, 0], rows)
        writer.finish()
    assert not list(one_megabyte.iterdir())
