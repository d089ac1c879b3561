"""What headers of tables, overlays and sessions have in common."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from safetensors.numpy import load

from edge_memllm.artifact.tensor_header import (
    LENGTH,
    FileKind,
    Tensors,
    data_bytes,
    header_bytes,
    tensor_views,
)
from edge_memllm.errors import ArtifactError

KIND = FileKind("cake", "1", "cake", "a cake", "Bake one.", "bake it again")
METADATA = {"format": "cake", "format_version": "1", "slices": "8"}
TENSORS: Tensors = {
    "layers": (np.dtype("<f4"), (2, 3)),
    "none": (np.dtype("u1"), (0,)),
    "crumbs": (np.dtype("<u2"), (5,)),
}


def read(header: bytes, size: int = 0) -> bytes:
    return KIND.read(io.BufferedReader(io.BytesIO(header)), size or len(header), "here")


@pytest.mark.parametrize("unit", [8, 512, 4096])
def test_other_programs_read_what_is_written(unit: int) -> None:
    header = header_bytes(METADATA, TENSORS, unit)
    assert len(header) % unit == 0
    data = header + bytes(range(data_bytes(TENSORS)))
    views = tensor_views(data, len(header), TENSORS)
    found = load(data)
    assert found.keys() == views.keys() == TENSORS.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, views[name])


def test_what_is_written_is_read() -> None:
    header = header_bytes(METADATA, TENSORS, 64)
    assert read(header + b"data") == header
    assert KIND.metadata(header, "here", ("slices",)).values == METADATA
    KIND.check_same(header, header, "here")


@pytest.mark.parametrize("length", [0, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_lengths_that_cannot_be(length: int) -> None:
    message = f"here: this is not a cake: 100 bytes, {length} of them said to be a header"
    with pytest.raises(ArtifactError, match=message):
        read(LENGTH.pack(length) + b"{}", 100)


def test_a_length_beyond_what_json_may_have_is_refused_however_large_the_file_is() -> None:
    with pytest.raises(ArtifactError, match="1048577 of them said to be a header"):
        read(LENGTH.pack((1 << 20) + 1), 1 << 40)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"this is not a cake \(no format 'cake'\). Bake one."),
        ({}, r"this is not a cake \(no format 'cake'\). Bake one."),
        (METADATA | {"format_version": "2"}, "cake format version '2', this version reads '1'. "),
        (METADATA | {"more": ""}, "here: __metadata__: unknown key 'more'"),
        ({"format": "cake", "format_version": "1"}, "here: __metadata__: key 'slices' is missing"),
    ],
)
def test_metadata_of_another_file(metadata: object, message: str) -> None:
    content = json.dumps({"__metadata__": metadata}).encode()
    with pytest.raises(ArtifactError, match=message):
        KIND.metadata(LENGTH.pack(len(content)) + content, "here", ("slices",))


def test_one_space_more_is_another_header() -> None:
    header = header_bytes(METADATA, TENSORS, 8)
    with pytest.raises(ArtifactError, match=r"that its metadata make.*bake it again"):
        KIND.check_same(header_bytes(METADATA, TENSORS, 16 + len(header)), header, "here")
