from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.sampling import place_of_largest, widen

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def test_every_finite_number_keeps_its_value() -> None:
    finite = EVERY[np.isfinite(EVERY)]
    found = widen(finite, np.empty(finite.size, np.float32))
    np.testing.assert_array_equal(found.view(np.int32), finite.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("bad", EVERY[~np.isfinite(EVERY)][::97])
def test_what_is_not_finite_stays_so(bad: np.float16) -> None:
    halves = np.array([[1.5, bad, -2.0]], np.float16)
    found = widen(halves, np.empty((1, 3), np.float32))
    np.testing.assert_array_equal(found, halves.astype(np.float32))
    assert not np.isfinite(found[0, 1])


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7C01, 0xFC01, 0x7FFF, 0xFFFF])
def test_each_kind_of_not_finite_is_seen_alone(bits: int) -> None:
    halves = np.array([bits], np.uint16).view(np.float16)
    assert not np.isfinite(widen(halves, np.empty(1, np.float32)))[0]


@pytest.mark.parametrize("shape", [(1, 0, 7), (2, 3, 5)])
def test_any_shape_is_written_in_place(shape: tuple[int, ...]) -> None:
    halves = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    out = np.empty(shape, np.float32)
    assert widen(halves, out) is out
    np.testing.assert_array_equal(out, halves.astype(np.float32))


@given(st.lists(st.floats(width=16), min_size=1, max_size=30))
def test_the_largest_is_found_or_there_is_no_telling(values: list[float]) -> None:
    halves = np.array(values, np.float16)
    if np.isfinite(halves).all() and halves.max() > 0:
        assert place_of_largest(halves) == halves.astype(np.float32).argmax()
    else:
        assert place_of_largest(halves) is None
