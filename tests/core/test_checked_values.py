"""Numbers from callers: strict, and refused in a line whatever they are."""

from __future__ import annotations

import numpy as np
import pytest

from edge_memllm.checked_values import (
    Fields,
    check_integer,
    check_number,
    is_integer,
    is_number,
    wrong_value,
)
from edge_memllm.errors import RequestError

NO_NUMBERS = (True, False, None, "1", b"1", [1], {}, 1j, np.True_, float("nan"), 10**400)


@pytest.mark.parametrize("value", [*NO_NUMBERS[:-2], 1.0, float("inf"), np.float64(1)], ids=repr)
def test_what_is_no_integer(value: object) -> None:
    assert not is_integer(value)
    with pytest.raises(RequestError, match=r"^n is .*, expected an integer from -9 to 9\.$"):
        check_integer("n", value, -9, 9)


@pytest.mark.parametrize("value", [*NO_NUMBERS, float("inf"), -float("inf")], ids=repr)
def test_what_is_no_number(value: object) -> None:
    assert not is_number(value)
    with pytest.raises(RequestError, match=r"^n is .*, expected a number from -1\.5 to 2\.$"):
        check_number("n", value, -1.5, 2)


@pytest.mark.parametrize("value", [3, 9])
def test_both_ends_are_in_the_range(value: int) -> None:
    assert check_integer("n", value, 3, 9) == check_number("n", value, 3, 9) == value
    assert check_integer("n", value, 3) == value


@pytest.mark.parametrize("value", [2, 10])
def test_what_is_beyond_either_end_is_refused(value: int) -> None:
    with pytest.raises(RequestError, match=f"n is {value}, expected an integer from 3 to 9"):
        check_integer("n", value, 3, 9)
    with pytest.raises(RequestError, match=f"n is {value}, expected a number from 3 to 9"):
        check_number("n", value, 3, 9)
    with pytest.raises(RequestError, match=f"n is {value}, expected an integer of at least 11"):
        check_integer("n", value, 11)


@pytest.mark.parametrize("value", [10**5000, -(10**5000), "x" * 5000, [0] * 5000], ids="abcd")
def test_a_refusal_is_a_line_whatever_was_given(value: object) -> None:
    assert len(str(wrong_value("n", value, "less"))) < 80


def test_whoever_reads_fields_says_which_error_a_wrong_value_is() -> None:
    def refusal(key: str, value: object, expected: str) -> Exception:
        return KeyError(key, value, expected)

    fields = Fields({"a": 1, "b": None}, refusal)
    assert fields.flag("b", default=True)
    assert fields.optional_number("b", 0, 1) is fields.optional_items("c", 1) is None
    for wrong, expected in (
        (lambda: fields.flag("a"), "true or false"),
        (lambda: fields.optional_items("a", 3), "a list of at most 3"),
        (lambda: fields.optional_number("a", 2, 3), "a number from 2 to 3"),
    ):
        with pytest.raises(KeyError) as caught:
            wrong()
        assert caught.value.args == ("a", 1, expected)
    with pytest.raises(KeyError, match=r"'c', None, 'a list'"):
        fields.integers("c", 0, 1)
