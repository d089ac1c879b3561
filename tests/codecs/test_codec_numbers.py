"""What single codecs promise beyond the contract: scales, levels, bytes, independent oracles."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest

from edge_memllm.codecs import codec_ids, get_codec
from edge_memllm.codecs.levels import INT2_LEVELS as INT2
from edge_memllm.codecs.levels import INT3_LEVELS as INT3
from edge_memllm.codecs.levels import NF4_LEVELS as NF4
from edge_memllm.codecs.levels import CodebookFit
from edge_memllm.codecs.wire import pack, unpack
from edge_memllm.errors import RuntimeUnavailableError
from support.ready_codecs import ready

WIDTH = 256
UNIFORM = [each for each in codec_ids() if each.startswith(("int8-", "int4-"))]
LEVELED = [each for each in codec_ids() if each.startswith(("nf4", "int3", "int2"))]


@pytest.mark.parametrize("codec_id", [*UNIFORM, "fp8-g32", "nested8-g32", *LEVELED])
def test_all_zero_group_has_scale_zero_and_decodes_to_zero(codec_id: str) -> None:
    codec = get_codec(codec_id)
    rows = np.zeros((1, 2, WIDTH), np.float32)
    rows[0, 1] = 1
    scales, codes = codec.encode(rows)
    assert scales.view("<f2")[0, 0] == 0
    assert not codec.decode(scales, codes, 2, WIDTH)[0, 0].any()
    if codec_id in UNIFORM:
        zeros = codes[0, : codes.shape[1] // 2]
        assert set(zeros.tolist()) == {128 if codec.wire == "q8" else 0x88}


@pytest.mark.parametrize("codec_id", UNIFORM)
def test_scales_are_the_smallest_float16_that_clips_nothing(
    codec_id: str, random: np.random.Generator
) -> None:
    codec = get_codec(codec_id)
    rows = random.standard_normal((64, 4, WIDTH)).astype(np.float32)
    groups = rows.reshape(-1, codec.group).astype(np.float64)
    above, below = groups.max(axis=1), -groups.min(axis=1)
    if codec.wire == "q8":
        exact = np.maximum(above, below) / 127
    else:
        exact = np.maximum(np.maximum(above, below) / 8, np.minimum(above, below) / 7)
    scales, _ = codec.encode(rows)
    stored = np.abs(scales.view("<f2").reshape(-1))
    assert (stored >= exact * (1 - 2**-23)).all()
    assert (np.nextafter(stored, np.float16(0)) < exact).all()


def test_int8_never_uses_code_0(random: np.random.Generator) -> None:
    rows = random.standard_normal((64, 4, WIDTH)).astype(np.float32)
    _, codes = get_codec("int8-g32").encode(rows)
    assert codes.min() == 1
    assert codes.max() == 255


def test_int4_uses_its_whole_range_on_either_side() -> None:
    ramp = np.arange(-8, 8, dtype=np.float32).repeat(2)
    rows = np.stack([ramp, -ramp])[:, None, :]
    scales, codes = get_codec("int4-g32").encode(rows)
    assert scales.view("<f2").tolist() == [[1.0], [-1.0]]
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(get_codec("int4-g32").decode(scales, codes, 1, 32), rows)


def test_int4a_is_exact_on_sixteen_even_steps_from_anywhere() -> None:
    rows = (100 + np.arange(16, dtype=np.float32) / 4).repeat(2).reshape(1, 1, 32)
    codec = get_codec("int4a-g32")
    scales, codes = codec.encode(rows)
    assert scales.view("<f2").tolist() == [[0.25, 100.0]]
    np.testing.assert_array_equal(codec.decode(scales, codes, 1, 32), rows)


@pytest.mark.parametrize("codec_id", [*LEVELED, "codebook3-g64"])
def test_the_value_farthest_from_zero_is_exact_but_for_its_scale(
    codec_id: str, random: np.random.Generator
) -> None:
    codec = ready(codec_id, 2, WIDTH)
    rows = random.standard_normal((50, 2, WIDTH)).astype(np.float32)
    groups = rows.reshape(-1, codec.group)
    decoded = codec.decode(*codec.encode(rows), 2, WIDTH).reshape(groups.shape)
    places = np.abs(groups).argmax(axis=1)[:, None]
    farthest = np.take_along_axis(groups, places, 1)
    found = np.take_along_axis(decoded, places, 1)
    assert (np.abs(found / farthest - 1) <= 2.0**-10).all()


RMS = [
    ("fp8-g32", 0.027), ("int8-g32", 0.0060), ("nested8-g32", 0.0060), ("int4-g32", 0.088),
    ("int4a-g32", 0.080), ("nf4-g64", 0.093), ("int3-g64", 0.19), ("int2-g32", 0.37),
]  # fmt: skip


@pytest.mark.parametrize(("codec_id", "limit"), RMS)
def test_error_on_gaussian_rows_is_that_of_good_quantisers(
    codec_id: str, limit: float, random: np.random.Generator
) -> None:
    # For comparison, gguf's Q8_0 has 0.0053 and Q4_0 has 0.085 of relative RMS error here.
    rows = random.standard_normal((16, 4, 512)).astype(np.float32)
    codec = get_codec(codec_id)
    error = codec.decode(*codec.encode(rows), 4, 512) - rows
    assert 0.85 * limit < np.sqrt((error**2).mean() / (rows**2).mean()) < limit


# --- small floats ----------------------------------------------------------------------------


def test_bf16_is_that_of_ml_dtypes(random: np.random.Generator) -> None:
    magnitudes = 10.0 ** random.integers(-6, 4, (8, 1, 1))
    rows = (random.standard_normal((8, 2, WIDTH)) * magnitudes).astype(np.float32)
    scales, codes = get_codec("bf16").encode(rows)
    expected = rows.astype(ml_dtypes.bfloat16)
    assert codes.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(
        get_codec("bf16").decode(scales, codes, 2, WIDTH),
        expected.astype(np.float16).astype(np.float32),
    )


def test_fp8_of_every_byte_is_that_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    scales = np.full((1, 8), 2.0, "<f2").view(np.uint8)
    found = get_codec("fp8-g32").decode(scales, codes, 1, 256)[0, 0]
    expected = codes[0].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * 2
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("codec_id", ["bf16", "fp8-g32"])
def test_what_encoding_needs_is_said(codec_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.ones((1, 1, WIDTH), np.float32)
    stored = get_codec(codec_id).encode(rows)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    np.testing.assert_allclose(get_codec(codec_id).decode(*stored, 1, WIDTH), rows, rtol=1e-3)
    with pytest.raises(RuntimeUnavailableError, match=r"'ml_dtypes'.*pip install '\.\[export\]"):
        get_codec(codec_id).encode(rows)


# --- levels and packing ----------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "bits"), [(INT3, 3), (INT2, 2)])
def test_fixed_levels_are_what_learning_finds_for_a_normal_distribution(
    levels: tuple[int, ...], bits: int, random: np.random.Generator
) -> None:
    fit = CodebookFit(bits, 64, 1)
    for _ in range(4):
        fit.add(random.standard_normal((2000, 1, 640)).astype(np.float32))
    found = np.frombuffer(fit.parameters(), np.int8)
    np.testing.assert_allclose(found, levels, rtol=0, atol=2)


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    published = [
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(np.array(NF4) / 127, published, rtol=0, atol=0.5 / 127)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_is_a_little_endian_number(bits: int, random: np.random.Generator) -> None:
    codes = random.integers(0, 1 << bits, (3, 64)).astype(np.uint8)
    packed = pack(codes, bits)
    for row, stored in zip(codes.tolist(), packed, strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(row))
        assert stored.tobytes() == number.to_bytes(64 * bits // 8, "little")
    np.testing.assert_array_equal(unpack(packed, bits), codes)


# --- other implementations -------------------------------------------------------------------


@pytest.mark.parametrize(("codec_id", "name"), [("int8-g32", "Q8_0"), ("int4-g32", "Q4_0")])
def test_as_exact_as_the_same_blocks_of_gguf(
    codec_id: str, name: str, random: np.random.Generator
) -> None:
    gguf = pytest.importorskip("gguf")
    rows = random.standard_normal((32, 4, 256)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    theirs = gguf.dequantize(gguf.quantize(rows.reshape(-1, 256), kind), kind).reshape(rows.shape)
    codec = get_codec(codec_id)
    ours = codec.decode(*codec.encode(rows), 4, 256)
    errors = [float(np.square(found - rows).mean()) for found in (ours, theirs)]
    assert errors[0] < 1.15 * errors[1]
    # Scales differ in rounding only, so most values fall on nearly the same levels.
    step = np.abs(theirs).max() / (127 if codec_id == "int8-g32" else 8)
    assert np.mean(np.abs(ours - theirs) < step / 8) > 0.85


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_blocks_of_gguf_decode_to_the_same_values(name: str, random: np.random.Generator) -> None:
    """A block is a float16 scale and 32 codes; ours keep scales and codes apart."""
    gguf = pytest.importorskip("gguf")
    rows = random.standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quantize(rows, kind).reshape(4, 2, -1)
    scales = blocks[:, :, :2].reshape(4, -1)
    codes = blocks[:, :, 2:]
    if name == "Q8_0":  # signed
        codec, codes = get_codec("int8-g32"), (codes ^ 0x80).reshape(4, -1)
    else:  # sixteen low nibbles first, then sixteen high ones
        each = np.concatenate([codes & 15, codes >> 4], axis=2).reshape(4, -1)
        codec, codes = get_codec("int4-g32"), pack(each, 4)
    found = codec.decode(scales, codes, 1, 64)[:, 0]
    np.testing.assert_array_equal(found, gguf.dequantize(blocks.reshape(4, -1), kind))
