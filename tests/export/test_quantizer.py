"""Round-to-nearest blocks for MatMulNBits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edge_memllm.errors import ExportError
from edge_memllm_export.weights.quantizer import BLOCKS, block_for, quantize
from support.matrices import dequantize

FLOAT16, FLOAT32 = np.dtype("float16"), np.dtype("float32")


@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 70)),
        elements=st.floats(-1000, 1000, width=32),
    ),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(BLOCKS),
    st.sampled_from([FLOAT16, FLOAT32]),
)
def test_error_is_at_most_a_step_per_block(
    weight: np.ndarray, bits: int, size: int, dtype: np.dtype
) -> None:
    codes, scales = quantize(weight, bits, size, dtype, "w")
    back = dequantize(codes, scales, bits, weight.shape[1])
    for row, row_back in zip(weight, back, strict=True):
        for start in range(0, len(row), size):
            block, block_back = row[start : start + size], row_back[start : start + size]
            # The extreme on the last code of the longer side: half a step, and one where the
            # shorter side clips an equal extreme. Least squares can only lower the sum.
            # A subnormal float16 scale is off by up to 2**-25, which counts once per code.
            step = np.abs(block).max() / 2 ** (bits - 1) * 1.001 + 2.0 ** (bits - 26)
            assert np.linalg.norm(block - block_back) <= step * len(block) ** 0.5


@pytest.mark.parametrize(("bits", "width"), [(2, 8), (4, 16), (8, 32)])
def test_layout(bits: int, width: int) -> None:
    codes, scales = quantize(np.ones((3, 80), np.float32), bits, 32, FLOAT16, "w")
    assert codes.shape == (3, 3, width)
    assert codes.dtype == np.uint8
    assert scales.shape == (3, 3)
    assert scales.dtype == FLOAT16


@pytest.mark.parametrize(
    ("columns", "asked", "block"), [(1023, None, 32), (1024, None, 128), (4096, 64, 64)]
)
def test_block_without_and_with_a_choice(columns: int, asked: int | None, block: int) -> None:
    assert block_for(columns, asked) == block


def test_worked_example() -> None:
    weight = np.zeros((1, 32), np.float32)
    weight[0, :3] = [-8, 3, 7]  # scale 1, or -1 with the extreme on the other side
    codes, scales = quantize(weight, 4, 32, FLOAT32, "w")
    assert scales.tolist() == [[1.0]]
    assert codes[0, 0, :2].tolist() == [0 | 11 << 4, 15 | 8 << 4]  # low nibble first, around 8
    np.testing.assert_array_equal(dequantize(codes, scales, 4, 32), weight)


def test_zero_block_is_exact() -> None:
    codes, scales = quantize(np.zeros((2, 64), np.float32), 4, 32, FLOAT16, "w")
    assert not scales.any()
    assert (codes == 0x88).all()


def test_weights_too_small_for_a_step_become_zero() -> None:
    weight = np.full((1, 32), 1.6e-39, np.float32)
    assert not dequantize(*quantize(weight, 4, 32, FLOAT32, "w"), 4, 32).any()


def test_rows_are_worked_on_in_parts_without_a_seam(
    monkeypatch: pytest.MonkeyPatch, random: np.random.Generator
) -> None:
    weight = random.standard_normal((37, 96)).astype(np.float32)
    whole = quantize(weight, 4, 32, FLOAT16, "w")
    monkeypatch.setattr("edge_memllm_export.weights.quantizer.CHUNK_WEIGHTS", 96 * 5)
    for part, expected in zip(quantize(weight, 4, 32, FLOAT16, "w"), whole, strict=True):
        np.testing.assert_array_equal(part, expected)


def test_error_is_a_tenth_below_plain_rounding(random: np.random.Generator) -> None:
    """Plain: the extreme on -8, as ONNX Runtime's own quantiser has it."""
    weight = random.standard_normal((500, 32)).astype(np.float32)
    extreme = np.take_along_axis(weight, np.abs(weight).argmax(1)[:, None], 1)
    step = (extreme / -8).astype(np.float16).astype(np.float32)
    plain = np.clip(np.rint(weight / step), -8, 7) * step
    ours = dequantize(*quantize(weight, 4, 32, FLOAT16, "w"), 4, 32)
    assert np.square(ours - weight).sum() <= 0.92 * np.square(plain - weight).sum()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e9])
def test_weights_without_a_scale_are_refused(value: float) -> None:
    weight = np.ones((70, 64), np.float32)
    weight[69, 40] = value
    with pytest.raises(ExportError, match=r"lm_head: a weight between rows 0 and 70 is not finite"):
        quantize(weight, 4, 32, FLOAT16, "lm_head")
