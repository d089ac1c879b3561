from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from edge_memllm.artifact.layout import RecordBuffer, RecordLayout, checksum_seed, record_checksum
from edge_memllm.codecs import get_codec
from support.ready_codecs import IDS, ready
from support.small_model import IDENTITY

CHECKSUM_OF_EDGE = 0x49BBD64FFBBFE33A  # xxh3-64 of b"edge" with seed 2^63 + 5
LAYOUT = RecordLayout(3, 128, get_codec("int4-g32"), "float16", 512)


def test_sizes_add_up() -> None:
    assert LAYOUT.embedding_bytes == 128 * 2
    assert LAYOUT.scales_bytes == 3 * 128 // 32 * 2
    assert LAYOUT.codes_bytes == 3 * 128 // 2
    assert LAYOUT.record_bytes == 256 + 24 + 192
    assert LAYOUT.stride == 512
    assert dataclasses.replace(LAYOUT, embedding_dtype="float32").stride == 1024
    assert dataclasses.replace(LAYOUT, alignment=4096).stride == 4096


def test_a_full_record_has_no_padding() -> None:
    layout = RecordLayout(1, 128, get_codec("f16"), "float16", 512)
    assert layout.record_bytes == layout.stride == 512


def test_one_scale_for_each_layer_fits_gemmas_record_into_fifteen_sectors() -> None:
    layouts = [
        RecordLayout(35, 256, get_codec(f"int4-g{group}"), "float16", 512, 1536)
        for group in (128, 256)
    ]
    assert [each.record_bytes for each in layouts] == [7692, 7622]
    assert [each.stride for each in layouts] == [8192, 7680]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_dtype": "bfloat16"}, "embedding dtype 'bfloat16', expected one of float16"),
        ({"alignment": 32}, "alignment 32, expected a power of two from 64 to 65536"),
        ({"alignment": 1000}, "alignment 1000, expected a power of two"),
        ({"alignment": 0}, "alignment 0, expected a power of two"),
        ({"layers": 0}, "codec int4-g32 without memory layers, expected codec none"),
        ({"codec": get_codec("none")}, "codec none: stores no memory rows, but there are 3"),
        ({"width": 100}, "width 100 is not a multiple of the group size 32"),
    ],
)
def test_layout_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LAYOUT, **change)


def layout_of(codec_id: str, width: int = 128) -> RecordLayout:
    layers = 0 if codec_id == "none" else 2
    return RecordLayout(layers, width, ready(codec_id, layers, width), "float16")


@pytest.mark.parametrize("codec_id", IDS)
def test_buffer_shows_what_was_read_into_it(codec_id: str, random: np.random.Generator) -> None:
    layout = layout_of(codec_id, 256)
    embedding = random.standard_normal((3, 256)).astype(np.float16)
    rows = random.standard_normal((3, layout.layers, 256)).astype(np.float32)
    scales, codes = layout.codec.encode(rows)
    buffer = RecordBuffer(layout, capacity=4)
    for slot in range(3):
        record = embedding[slot].tobytes() + scales[slot].tobytes() + codes[slot].tobytes()
        assert sum(map(len, buffer.parts(slot))) == len(record) == layout.record_bytes
        for part in buffer.parts(slot):
            part[:], record = record[: len(part)], record[len(part) :]

    buffer.transcode(3)
    np.testing.assert_array_equal(buffer.embedding(3), embedding)
    np.testing.assert_array_equal(
        buffer.rows(2), layout.codec.decode(scales[:2], codes[:2], layout.layers, 256)
    )
    assert not buffer.embedding(4)[3].any()
    fed = buffer.wire(3)
    if "memory_rows" in fed:
        decoded = fed["memory_rows"].astype(np.float32).reshape(rows.shape)
        np.testing.assert_array_equal(decoded, buffer.rows(3))
    assert not any(array[3].any() for array in buffer.wire(4).values())
    wire = sum(array[0].nbytes for array in fed.values())
    assert layout.buffer_bytes == layout.record_bytes + (wire if layout.codec.transcodes else 0)


@pytest.mark.parametrize(
    ("codec_id", "expected"),
    [
        ("none", {}),
        ("f32", {"memory_rows": ("float32", 256)}),
        ("f16", {"memory_rows": ("float16", 256)}),
        ("int8-g64", {"memory_codes": ("uint8", 256), "memory_scales": ("float16", 4)}),
        ("int4-g32", {"memory_codes": ("uint8", 128), "memory_scales": ("float16", 8)}),
        ("int3-g32", {"memory_codes": ("uint8", 256), "memory_scales": ("float16", 8)}),
        ("nested8-g64", {"memory_codes": ("uint8", 256), "memory_scales": ("float16", 4)}),
        ("bf16", {"memory_rows": ("float16", 256)}),
    ],
)
def test_wire_arrays_are_views_in_the_form_of_the_graph(
    codec_id: str, expected: dict[str, tuple[str, int]]
) -> None:
    buffer = RecordBuffer(layout_of(codec_id), capacity=4)
    wire = buffer.wire(3)
    assert {name: (str(array.dtype), array.shape) for name, array in wire.items()} == {
        name: (dtype, (3, columns)) for name, (dtype, columns) in expected.items()
    }
    assert all(array.flags.c_contiguous and array.base is not None for array in wire.values())
    for part in buffer.parts(1):
        part[:] = b"\x3c" * len(part)
    if layout_of(codec_id).codec.transcodes:
        return  # what is fed is not what was read
    assert all(array[1].all() and not array[0].any() for array in wire.values())


def test_the_coarse_part_is_the_front_of_the_record() -> None:
    layout = RecordLayout(3, 128, get_codec("nested8-g32"), "float16")
    coarse = layout.coarse
    assert coarse is not None
    assert (layout.checksums, coarse.checksums, coarse.coarse) == (2, 1, None)
    assert layout.record_bytes == 256 + 24 + 384
    assert coarse.record_bytes == 256 + 24 + 192
    assert (LAYOUT.checksums, LAYOUT.coarse) == (1, None)


def test_a_table_is_records_checksums_and_parameters() -> None:
    assert LAYOUT.table_bytes(10) == 10 * (512 + 8)
    assert layout_of("nested8-g32").table_bytes(10) == 10 * (1024 + 16)
    assert layout_of("lowrank-r64-f16").table_bytes(10) == 10 * (512 + 8) + 2 * 64 * 128 * 2


def test_seed_is_the_head_of_the_identity() -> None:
    assert checksum_seed("sha256:0100000000000080" + "ff" * 24) == 0x8000000000000001


def test_checksum_is_xxh3_of_the_whole_record() -> None:
    record = bytes(range(256)) * 4
    parts = [memoryview(record)[:10], memoryview(record)[10:700], memoryview(record)[700:]]
    for token in (0, 1, 1 << 24):
        expected = xxh3_64_intdigest(record, seed=checksum_seed(IDENTITY) ^ token)
        assert record_checksum(parts, token, checksum_seed(IDENTITY)) == expected
    assert record_checksum([memoryview(b"edge")], 5, 1 << 63) == CHECKSUM_OF_EDGE


def test_checksum_depends_on_token_and_model() -> None:
    parts = [memoryview(b"the same bytes")]
    values = {record_checksum(parts, token, seed) for token in range(50) for seed in (0, 1 << 40)}
    assert len(values) == 100
