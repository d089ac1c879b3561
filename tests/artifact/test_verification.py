"""Checking a whole artifact: what no single generation would have read is found too."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from edge_memllm.artifact import verification
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.verification import verify_artifact
from edge_memllm.errors import CorruptionError
from edge_memllm.table.table import Table
from support.small_model import SmallArtifact, file_spec, write_artifact


@pytest.fixture
def small(tmp_path: Path) -> SmallArtifact:
    return write_artifact(tmp_path / "artifact", vocab_size=24)


def verify(small: SmallArtifact) -> list[tuple[str, int, int]]:
    stages: list[tuple[str, int, int]] = []
    with Artifact.open(small.path) as artifact:
        verify_artifact(artifact, lambda *stage: stages.append(stage))
    return stages


def overwrite(small: SmallArtifact, token: int, offset: int) -> None:
    """Change one byte of a token's record or padding."""
    table = small.manifest.table
    place = table.records_offset + token * table.stride + offset
    content = bytearray(small.table.read_bytes())
    content[place] ^= 0x40
    small.table.write_bytes(content)


def forget_digest(small: SmallArtifact) -> None:
    """Let the manifest vouch for the table as it is, as a careless repair would."""
    files = dict(small.manifest.files)
    files[small.manifest.table.file] = file_spec(small.table.read_bytes())
    small.rewrite_manifest(files=files)


def test_a_good_artifact_is_read_to_its_end(
    small: SmallArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_CHUNK_BYTES", 10 * small.manifest.table.stride)
    assert verify(small) == [
        ("digests", 0, 1),
        ("digests", 1, 1),
        *(("records", done, 24) for done in (10, 20, 24)),
        *(("padding", done, 24) for done in (10, 20, 24)),
    ]


def test_a_changed_byte_is_found_by_the_digest(small: SmallArtifact) -> None:
    overwrite(small, token=17, offset=3)
    with pytest.raises(CorruptionError, match=r"sha256 is .*, the manifest says"):
        verify(small)


def test_a_changed_record_is_found_by_its_checksum(small: SmallArtifact) -> None:
    overwrite(small, token=17, offset=3)
    forget_digest(small)
    with pytest.raises(CorruptionError, match=r"record of token 17 .* does not match its checksum"):
        verify(small)


def test_coarse_checksums_are_checked_too(tmp_path: Path) -> None:
    """Whoever reads the front part alone would have found this one."""
    small = write_artifact(tmp_path / "nested", codec="nested8-g32")
    assert [stage for stage, *_ in verify(small)].count("coarse parts") == 1
    content = bytearray(small.table.read_bytes())
    place = len(content) - small.manifest.layout.checksums * 8 * (24 - 5)
    content[place] ^= 1
    small.table.write_bytes(content)
    checksums = hashlib.sha256(content[-24 * 16 :]).hexdigest()
    table = dataclasses.replace(small.manifest.table, checksums_sha256=checksums)
    small.rewrite_manifest(
        table=table, files=small.manifest.files | {table.file: file_spec(bytes(content))}
    )
    with Artifact.open(small.path) as artifact:
        Table.open(artifact).close()
    with pytest.raises(CorruptionError, match=r"record of token 5 .* does not match its checksum"):
        verify(small)


@pytest.mark.parametrize("token", [0, 13, 23])
def test_bytes_hidden_in_the_padding_are_found(
    token: int, small: SmallArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_CHUNK_BYTES", 10 * small.manifest.table.stride)
    overwrite(small, token, offset=small.manifest.table.record_bytes)
    forget_digest(small)
    with pytest.raises(CorruptionError, match=f"behind the record of token {token} is not zero"):
        verify(small)
