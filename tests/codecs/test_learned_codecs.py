"""Codecs with parameters that all tokens share: what they learn, and from what."""

from __future__ import annotations

import numpy as np
import pytest

from edge_memllm.codecs import Codec, get_codec
from edge_memllm.codecs.levels import CodebookFit
from support.ready_codecs import ready

LEARNING = ("codebook3-g32", "lowrank-r64-f16")


def learned(codec_id: str, rows: np.ndarray, weights: np.ndarray | None = None) -> Codec:
    codec = get_codec(codec_id)
    fit = codec.fit(*rows.shape[1:])
    fit.add(rows, weights)
    return codec.with_parameters(fit.parameters(), *rows.shape[1:])


def error(codec: Codec, rows: np.ndarray) -> np.ndarray:
    """Mean squared error of each row [N]."""
    found = codec.decode(*codec.encode(rows), *rows.shape[1:])
    return np.square(found - rows).mean(axis=(1, 2))


@pytest.mark.parametrize("codec_id", LEARNING)
def test_neither_chunks_nor_equal_weights_matter(
    codec_id: str, random: np.random.Generator
) -> None:
    rows = random.standard_normal((600, 2, 128)).astype(np.float32)
    fit = get_codec(codec_id).fit(2, 128)
    for start in range(0, 600, 70):
        part = rows[start : start + 70]
        fit.add(part, np.full(len(part), 3, np.float32))
    chunked = get_codec(codec_id).with_parameters(fit.parameters(), 2, 128)
    # Sums of float32 in another order: nearly, not exactly, the same directions.
    np.testing.assert_allclose(error(chunked, rows), error(learned(codec_id, rows), rows), 1e-3)


@pytest.mark.parametrize("codec_id", LEARNING)
def test_frequent_tokens_are_stored_better(codec_id: str, random: np.random.Generator) -> None:
    # Two kinds of rows that want different parameters.
    rows = random.uniform(-1, 1, (200, 1, 128)).astype(np.float32)
    rows[100:] = 3 * rows[100:] ** 5
    rows[100:, :, :96] *= 4
    weights = np.repeat([1000, 1], 100).astype(np.float32)
    even, uneven = learned(codec_id, rows), learned(codec_id, rows, weights)
    assert error(uneven, rows[:100]).mean() < 0.95 * error(even, rows[:100]).mean()


@pytest.mark.parametrize("codec_id", LEARNING)
def test_parameters_survive_being_stored(codec_id: str) -> None:
    codec = ready(codec_id, 2, 128)
    assert len(codec.parameters) == codec.parameters_bytes(2, 128)
    again = get_codec(codec_id).with_parameters(codec.parameters, 2, 128)
    assert again.parameters == codec.parameters


@pytest.mark.parametrize("codec_id", LEARNING)
def test_parameters_must_have_their_size(codec_id: str) -> None:
    with pytest.raises(ValueError, match=rf"codec {codec_id}: 3 bytes of parameters, expected \d+"):
        get_codec(codec_id).with_parameters(b"xyz", 2, 128)


@pytest.mark.parametrize(
    ("codec_id", "match"),
    [
        ("codebook3-g32", r"has levels for 0 layers, rows have 2"),
        ("lowrank-r64-f16", r"has no shared rows yet, to encode or decode \(2, 128\)"),
    ],
)
def test_nothing_is_encoded_without_parameters(codec_id: str, match: str) -> None:
    rows = np.zeros((1, 2, 128), np.float32)
    with pytest.raises(ValueError, match=match):
        get_codec(codec_id).encode(rows)
    with pytest.raises(ValueError, match=match):
        get_codec(codec_id).bound(rows)
    stored = ready(codec_id, 2, 128).encode(rows)
    with pytest.raises(ValueError, match=match.partition("rows have 2")[0].partition(r"\(")[0]):
        get_codec(codec_id).decode(*stored, 2, 128)


@pytest.mark.parametrize("codec_id", LEARNING)
def test_parameters_are_for_one_number_of_layers(codec_id: str) -> None:
    with pytest.raises(ValueError, match=rf"codec {codec_id}: has .* (have 3|\(3, 128\))"):
        ready(codec_id, 2, 128).encode(np.zeros((1, 3, 128), np.float32))


# --- codebook --------------------------------------------------------------------------------


def levels(*each: int) -> bytes:
    return np.array(each, np.int8).tobytes()


@pytest.mark.parametrize(
    "wrong",
    [(-60, -60, 1, 127), (1, -60, 50, 127), (-60, 0, 50, 126), (-128, 0, 50, 127)],
)
def test_levels_must_rise_to_127(wrong: tuple[int, ...]) -> None:
    parameters = levels(-60, 0, 60, 127) + levels(*wrong)
    with pytest.raises(ValueError, match=r"codebook2-g32: the levels of layer 1 are \[.*\], exp"):
        get_codec("codebook2-g32").with_parameters(parameters, 2, 32)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_rows_without_variety_can_be_used(value: float, bits: int) -> None:
    rows = np.full((5, 1, 32), value, np.float32)
    codec = learned(f"codebook{bits}-g32", rows)
    assert (error(codec, rows) < 1e-6).all()


def test_levels_are_those_of_the_data() -> None:
    fit = CodebookFit(2, 32, 1)
    rows = np.tile(np.array([127, -100, -10, 40], np.float32), (3, 1, 8))
    fit.add(rows)
    np.testing.assert_allclose(np.frombuffer(fit.parameters(), np.int8), [-100, -10, 40, 127])


# --- low rank --------------------------------------------------------------------------------


def test_rows_of_low_rank_are_exact_but_for_rounding(random: np.random.Generator) -> None:
    shared = random.standard_normal((2, 64, 128))
    rows = np.einsum("nk,lkd->nld", random.standard_normal((300, 64)), shared).astype(np.float32)
    relative = error(learned("lowrank-r64-f16", rows), rows) / np.square(rows).mean()
    assert (relative < 1e-5).all()


def test_the_error_is_that_of_the_singular_values_left_out(random: np.random.Generator) -> None:
    rows = random.standard_normal((400, 1, 128)) * np.linspace(1, 0.1, 128)
    values = np.linalg.svd(rows[:, 0], compute_uv=False)
    expected = np.square(values[64:]).sum() / rows.size
    found = error(learned("lowrank-r64-f16", rows.astype(np.float32)), rows.astype(np.float32))
    assert found.mean() == pytest.approx(expected, rel=1e-3)


def test_the_rank_is_at_most_the_width() -> None:
    with pytest.raises(ValueError, match="lowrank-r64-f16: the rank is 64, expected at most the w"):
        get_codec("lowrank-r64-f16").sizes(2, 32)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0])
def test_shared_rows_must_be_directions(value: float) -> None:
    parameters = np.full((1, 32, 32), value, "<f2").tobytes()
    with pytest.raises(ValueError, match="lowrank-r32-f16: shared rows hold values beyond 1 or no"):
        get_codec("lowrank-r32-f16").with_parameters(parameters, 1, 32)


def test_coefficients_too_large_are_refused() -> None:
    rows = np.full((2, 1, 128), 1000, np.float32)
    codec = learned("lowrank-r32-f16", rows)
    rows[1] = 60000
    with pytest.raises(ValueError, match=r"row 1, layer 0: coefficients: .* cannot be stored"):
        codec.encode(rows)
