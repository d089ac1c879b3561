"""The contract that every codec keeps, whatever it stores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_memllm import codecs
from edge_memllm.codecs import Codec, UnencodableRowError, codec_ids, get_codec
from edge_memllm.errors import ArtifactError
from support.ready_codecs import IDS, LOW_RANK, WITH_ROWS, ready

WIDTH = 256  # a multiple of every group size
SEARCHING = [each for each in WITH_ROWS if get_codec(each).searches]
GROUPED = [each for each in codec_ids() if get_codec(each).group]
COARSE = [each for each in codec_ids() if get_codec(each).coarse]


def check_codec(codec: Codec, rows: np.ndarray, *, search: bool = False) -> None:
    """Check the whole contract on rows [N, L, D] that the codec can hold."""
    count, layers, width = rows.shape
    sizes = codec.sizes(layers, width)
    scales, codes = codec.encode(rows, search=search)
    assert (scales.dtype, scales.shape) == (np.uint8, (count, sizes.scales_bytes))
    assert (codes.dtype, codes.shape) == (np.uint8, (count, sizes.codes_bytes))
    again = codec.encode(rows, search=search)
    assert (again[0].tobytes(), again[1].tobytes()) == (scales.tobytes(), codes.tobytes())

    decoded = codec.decode(scales, codes, layers, width)
    assert (decoded.dtype, decoded.shape) == (np.float32, rows.shape)
    error = np.abs(decoded.astype(np.float64) - rows)
    assert (error <= codec.bound(rows)).all()
    fed = transcoded(codec, scales, codes, layers, width)
    np.testing.assert_array_equal(decoded, values_of_wire(codec, *fed, rows.shape))
    if codec.id not in LOW_RANK:  # sums of many products depend on how many rows go at once
        check_rows_alone(codec, rows, scales, codes, search)


def check_rows_alone(
    codec: Codec, rows: np.ndarray, scales: np.ndarray, codes: np.ndarray, search: bool
) -> None:
    """Check that a record depends on its own row alone."""
    for row in range(len(rows)):
        alone = codec.encode(rows[row : row + 1], search=search)
        np.testing.assert_array_equal(alone[0][0], scales[row])
        np.testing.assert_array_equal(alone[1][0], codes[row])


def transcoded(
    codec: Codec, scales: np.ndarray, codes: np.ndarray, layers: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The wire form, written over what was in the buffers before."""
    fed = codec.wire_sizes(layers, width)
    out_scales = np.full((len(codes), fed.scales_bytes), 0xA5, np.uint8)
    out_codes = np.full((len(codes), fed.codes_bytes), 0xA5, np.uint8)
    codec.transcode(scales, codes, out_scales, out_codes)
    if not codec.transcodes:
        assert (out_scales.tobytes(), out_codes.tobytes()) == (scales.tobytes(), codes.tobytes())
    return out_scales, out_codes


def values_of_wire(
    codec: Codec, scales: np.ndarray, codes: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Decode as the specification words it, with nothing of the codec's own code."""
    if codec.wire == "none":
        return np.empty(shape, np.float32)
    if codec.wire in ("f16", "f32"):
        return codes.view({"f16": "<f2", "f32": "<f4"}[codec.wire]).reshape(shape)
    if codec.wire == "q4":
        codes = np.stack([codes % 16, codes // 16], axis=2).reshape(len(codes), shape[1] * shape[2])
    zero = {"q8": 128, "q4": 8}[codec.wire]
    each = np.repeat(scales.view("<f2"), codec.group, axis=1).astype(np.float32)
    return ((codes.astype(np.int32) - zero) * each).astype(np.float32).reshape(shape)


def largest(codec: Codec) -> float:
    """The largest magnitude of rows that can be stored whatever else stands in them."""
    # A coefficient sums up a whole row.
    return codec.limit / WIDTH if codec.id in LOW_RANK else codec.limit


def rows_of(codec: Codec, count: int = 3, layers: int = 2) -> st.SearchStrategy[np.ndarray]:
    """Rows of all magnitudes the codec holds; every group has a magnitude of its own."""
    if codec.id == "none":
        return st.just(np.empty((count, 0, WIDTH), np.float32))
    shape = (count, layers, WIDTH)
    limit = np.float32(largest(codec))
    anything = st.floats(-float(limit), float(limit), width=32)
    return st.one_of(
        arrays(np.float32, shape, elements=anything),
        st.builds(
            lambda seed, magnitude, offset: np.clip(
                (np.random.default_rng(seed).standard_normal(shape) + offset) * 10.0**magnitude,
                -limit,
                limit,
            ).astype(np.float32),
            st.integers(0, 1 << 30),
            st.integers(-12, 6),
            st.sampled_from([0, 0, 3, -100]),
        ),
    )


@pytest.mark.parametrize("codec_id", IDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_contract(codec_id: str, data: st.DataObject) -> None:
    codec = ready(codec_id, 2, WIDTH)
    check_codec(codec, data.draw(rows_of(codec)))


@pytest.mark.parametrize("codec_id", SEARCHING)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_contract_with_search(codec_id: str, data: st.DataObject) -> None:
    codec = ready(codec_id, 2, WIDTH)
    check_codec(codec, data.draw(rows_of(codec)), search=True)


@pytest.mark.parametrize("codec_id", COARSE)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_contract_of_the_coarse_part(codec_id: str, data: st.DataObject) -> None:
    codec = ready(codec_id, 2, WIDTH)
    assert codec.coarse is not None
    rows = data.draw(rows_of(codec))
    check_codec(codec.coarse, rows)
    whole, part = codec.encode(rows), codec.coarse.encode(rows)
    for stored, front in zip(whole, part, strict=True):
        np.testing.assert_array_equal(stored[:, : front.shape[1]], front)
    assert part[0].shape == whole[0].shape  # scales are all in front
    assert codec.coarse.coarse is None


@pytest.mark.parametrize("codec_id", IDS)
def test_contract_on_no_rows_and_on_views(codec_id: str, random: np.random.Generator) -> None:
    layers = 0 if codec_id == "none" else 3
    codec = ready(codec_id, layers, WIDTH)
    rows = random.standard_normal((4, layers, 2 * WIDTH)).astype(np.float32)
    check_codec(codec, rows[:0, :, :WIDTH])
    check_codec(codec, rows[::2, :, ::2])


@pytest.mark.parametrize("codec_id", WITH_ROWS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, 2.0**-24, 2.0**-25, 6e-5, "limit"])
def test_contract_at_the_edges(codec_id: str, value: float | str) -> None:
    codec = ready(codec_id, 1, WIDTH)
    number = largest(codec) if value == "limit" else float(value)
    rows = np.zeros((2, 1, WIDTH), np.float32)
    rows[0] = number
    rows[1, 0, 5] = -number
    check_codec(codec, rows)
    assert np.isfinite(codec.decode(*codec.encode(rows), 1, WIDTH)).all()


@pytest.mark.parametrize("codec_id", WITH_ROWS)
def test_chunks_longer_than_a_block(
    codec_id: str, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs.codec, "_BLOCK_VALUES", 5 * WIDTH)  # two rows a block
    rows = random.standard_normal((7, 2, WIDTH)).astype(np.float32)
    check_codec(ready(codec_id, 2, WIDTH), rows)


@pytest.mark.parametrize("codec_id", WITH_ROWS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(
    codec_id: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs.codec, "_BLOCK_VALUES", 2 * 3 * WIDTH)
    rows = np.ones((6, 3, WIDTH), np.float32)
    rows[4, 1, 100] = value
    match = rf"^row 4, layer 1: {value:g} cannot be stored, codec {codec_id} holds magnitudes up"
    with pytest.raises(UnencodableRowError, match=match) as caught:
        ready(codec_id, 3, WIDTH).encode(rows)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.row, caught.value.layer) == (4, 1)


@pytest.mark.parametrize("codec_id", [each for each in codec_ids()[1:] if each != "none"])
def test_refuses_what_is_too_large(codec_id: str) -> None:
    codec = ready(codec_id, 1, WIDTH)
    rows = np.full((1, 1, WIDTH), codec.limit, np.float32)
    assert np.isfinite(codec.decode(*codec.encode(rows), 1, WIDTH)).all()
    rows[0, 0, 0] = -np.nextafter(np.float32(codec.limit), np.float32(np.inf))
    with pytest.raises(UnencodableRowError, match=r"row 0, layer 0: -.* cannot be stored"):
        codec.encode(rows)


@pytest.mark.parametrize("codec_id", SEARCHING)
def test_search_is_never_worse(codec_id: str, random: np.random.Generator) -> None:
    codec = ready(codec_id, 2, WIDTH)
    rows = random.standard_normal((40, 2, WIDTH)).astype(np.float32)
    errors = []
    for search in (False, True):
        decoded = codec.decode(*codec.encode(rows, search=search), 2, WIDTH)
        squared = (decoded - rows) ** 2
        if codec_id in LOW_RANK:
            squared = squared.mean(keepdims=True)
        else:
            squared = squared.reshape(-1, codec.group).sum(axis=1)
        errors.append(squared)
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    # What a low rank leaves out is most of its error, and not for a search to find.
    assert errors[1].sum() < (1 if codec_id in LOW_RANK else 0.99) * errors[0].sum()


@pytest.mark.parametrize("codec_id", [each for each in WITH_ROWS if each not in SEARCHING])
def test_search_without_a_choice_of_scales_is_refused(codec_id: str) -> None:
    with pytest.raises(ValueError, match=f"codec {codec_id}: there are no scales to search for"):
        ready(codec_id, 1, WIDTH).encode(np.zeros((1, 1, WIDTH), np.float32), search=True)


def test_encoding_leaves_its_input_alone(random: np.random.Generator) -> None:
    rows = random.standard_normal((2, 2, WIDTH)).astype(np.float32)
    before = rows.copy()
    for codec_id in WITH_ROWS:
        codec = ready(codec_id, 2, WIDTH)
        codec.encode(rows, search=codec.searches)
        codec.bound(rows)
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("codec_id", GROUPED)
def test_group_must_divide_the_width(codec_id: str) -> None:
    codec = get_codec(codec_id)
    match = f"codec {codec_id}: width 100 is not a multiple of the group size {codec.group}"
    with pytest.raises(ValueError, match=match):
        codec.encode(np.zeros((1, 1, 100), np.float32))


@pytest.mark.parametrize("codec_id", WITH_ROWS)
def test_decode_checks_its_sizes(codec_id: str) -> None:
    codec = ready(codec_id, 1, WIDTH)
    scales, codes = codec.encode(np.zeros((2, 1, WIDTH), np.float32))
    with pytest.raises(ValueError, match=rf"codec {codec_id}: scales .* expected .* 2 layers"):
        codec.decode(scales, codes, 2, WIDTH)


def test_none_stores_no_layers() -> None:
    with pytest.raises(ValueError, match="codec none: stores no memory rows, but there are 2"):
        get_codec("none").sizes(2, WIDTH)


def test_codecs_without_parameters_take_and_learn_none() -> None:
    codec = get_codec("int8-g32")
    assert codec.with_parameters(b"", 2, WIDTH) is codec
    with pytest.raises(ValueError, match="codec int8-g32: 1 bytes of parameters, expected 0"):
        codec.with_parameters(b"x", 2, WIDTH)
    with pytest.raises(NotImplementedError, match="codec int8-g32 has no parameters"):
        codec.fit(2, WIDTH)


@pytest.mark.parametrize(
    "codec_id",
    ["int8", "int8-g16", "", "F32", "lowrank-r0-f16", "lowrank-r64", "lowrank-r64-int8-g64"],
)
def test_unknown_codec(codec_id: str) -> None:
    with pytest.raises(ArtifactError, match=f"Unknown codec '{codec_id}', this version knows f32"):
        get_codec(codec_id)


def test_ids_are_the_documented_ones() -> None:
    grouped = (
        "fp8", "int8", "nested8", "int6", "int5", "int4", "int4a", "nf4", "int3", "int2",
        "codebook4", "codebook3", "codebook2",
    )  # fmt: skip
    with_groups = [f"{name}-g{group}" for name in grouped for group in (32, 64, 128, 256)]
    assert codec_ids() == ("f32", "f16", "bf16", *with_groups, "none")
    assert all(get_codec(codec).id == codec for codec in IDS)
