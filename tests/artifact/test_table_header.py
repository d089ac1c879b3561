"""Headers of the table file that are damaged or lie: each must end in a typed error."""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import FileSpec
from edge_memllm.artifact.tensor_header import check_header
from edge_memllm.errors import ArtifactError
from edge_memllm.table.table import Table
from support.small_model import SmallArtifact, flip

HEADER = 4096


def header_of(small: SmallArtifact) -> dict[str, Any]:
    return json.loads(small.table.read_bytes()[8:HEADER])


def put_header(small: SmallArtifact, text: bytes, length: int = HEADER - 8) -> None:
    with small.table.open("r+b") as file:
        file.write(struct.pack("<Q", length) + text.ljust(HEADER - 8))


def open_table(small: SmallArtifact) -> None:
    with Artifact.open(small.path) as artifact:
        Table.open(artifact).close()


def refused(small: SmallArtifact) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_table(small)
    where, _, message = str(caught.value).partition("table.safetensors: ")
    assert where.endswith("artifact/")
    return message


@pytest.mark.parametrize("length", [0, 1, HEADER - 9, HEADER, 1 << 20, 1 << 31, 1 << 63, 2**64 - 1])
def test_header_length(small: SmallArtifact, length: int) -> None:
    put_header(small, json.dumps(header_of(small)).encode(), length)
    assert refused(small).startswith(f"the header is {length} bytes, expected {HEADER - 8} and at")


def test_header_length_beyond_the_cap(small: SmallArtifact) -> None:
    # Manifest and table agree on a header of 2 MB.
    offset = 2 << 20
    content = small.table.read_bytes()
    padded = struct.pack("<Q", offset - 8) + content[8:HEADER].ljust(offset - 8) + content[HEADER:]
    small.table.write_bytes(padded)
    name = small.manifest.table.file
    small.rewrite_manifest(
        table=dataclasses.replace(small.manifest.table, records_offset=offset),
        files=small.manifest.files | {name: FileSpec(len(padded), "0" * 64)},
    )
    assert refused(small).startswith(f"the header is {offset - 8} bytes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the header does not start with '{'"),
        (b' {"records": 1}', "the header does not start with '{'"),
        (b"{" * 4000, "not valid JSON"),
        (b'{"a":' * 800, "not valid JSON"),
        (b"{}", "key '__metadata__' is missing"),
        (b'{"records": 1, "records": 2}', "key 'records' appears twice"),
        (b"\0" * 4000, "the header does not start with '{'"),
    ],
)
def test_header_that_is_not_json(small: SmallArtifact, text: bytes, message: str) -> None:
    put_header(small, text)
    assert message in refused(small)


RECORDS, CHECKSUMS = 24 * 512, 24 * 520


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["extra"], {}, "unknown key 'extra'"),
        (["records"], None, "tensor 'records' is null"),
        (["records", "dtype"], "I8", "tensor 'records' is"),
        (["records", "shape"], [24, 513], "tensor 'records' is"),
        (["records", "shape"], [24, 512, 1], "tensor 'records' is"),
        (["records", "shape"], [24.0, 512], "tensor 'records' is"),
        (["records", "shape"], [-24, -512], "tensor 'records' is"),
        (["records", "shape"], [1 << 62, 1 << 62], "tensor 'records' is"),
        (["records", "data_offsets"], [8, RECORDS + 8], "tensor 'records' is"),
        (["records", "data_offsets"], [False, RECORDS], "tensor 'records' is"),
        (["records", "data_offsets"], [0, RECORDS - 512], "tensor 'records' is"),
        (["records", "data_offsets"], [RECORDS, 0], "tensor 'records' is"),
        (["records", "data_offsets"], [0, (1 << 64) + RECORDS], "tensor 'records' is"),
        (["records", "extra"], 1, "tensor 'records' is"),
        (["checksums", "dtype"], "F64", "tensor 'checksums' is"),
        (["checksums", "shape"], [25], "tensor 'checksums' is"),
        (["checksums", "data_offsets"], [0, 192], "tensor 'checksums' is"),
        (["checksums", "data_offsets"], [RECORDS + 8, CHECKSUMS + 8], "tensor 'checksums' is"),
        (["__metadata__"], [], "__metadata__ is a list of 0, expected an object"),
        (["__metadata__", "note"], "", "unknown key 'note'"),
        (["__metadata__", "format"], "other", 'format is "other", the manifest says'),
        (["__metadata__", "format_version"], "2", 'format_version is "2", the manifest says "1"'),
        (["__metadata__", "format_version"], 1, 'format_version is 1, the manifest says "1"'),
        (["__metadata__", "identity"], 7, "this is the table of model 7, the manifest is for"),
        (["__metadata__", "identity"], "x\n" * 99, "this is the table of model x\\nx\\n"),
        (["__metadata__", "codec"], "f16", 'codec is "f16", the manifest says "int8-g32"'),
        (["__metadata__", "alignment"], "4096", 'alignment is "4096", the manifest says "512"'),
        (["__metadata__", "width"], "6" * 1000, 'width is "666'),
    ],
)
def test_header_that_differs(
    small: SmallArtifact, path: list[str], value: object, message: str
) -> None:
    header = header_of(small)
    inner = header
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    put_header(small, json.dumps(header).encode())
    found = refused(small)
    assert message in found
    assert len(found) < 500


def test_header_key_that_is_missing(small: SmallArtifact) -> None:
    header = header_of(small)
    del header["__metadata__"]["identity"]
    put_header(small, json.dumps(header).encode())
    assert "__metadata__: key 'identity' is missing" in refused(small)


def test_header_may_be_written_otherwise(small: SmallArtifact) -> None:
    header = dict(reversed(header_of(small).items()))
    put_header(small, json.dumps(header, indent=1).encode())
    open_table(small)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(bit=st.integers(0, 8 * HEADER - 1))
def test_flipped_bit_in_the_header(small: SmallArtifact, bit: int) -> None:
    flip(small.table, bit // 8, bit % 8)
    refused(small)
    flip(small.table, bit // 8, bit % 8)


def test_every_flipped_bit_of_the_header_is_refused(small: SmallArtifact) -> None:
    good = small.table.read_bytes()[8:HEADER].rstrip() + b"  "
    model = small.manifest.model
    check_header(good, small.manifest.layout, model.vocab_size, model.identity, "here")
    for bit in range(len(good) * 8):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArtifactError, match=r"^here: "):
            check_header(
                bytes(data), small.manifest.layout, model.vocab_size, model.identity, "here"
            )
