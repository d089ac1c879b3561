"""Python functions as tools: what a model is told of them is what transformers would tell it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Optional, Union

import pytest

from edge_memllm.errors import RequestError
from edge_memllm.text.tools.functions import function_tool


class Colour(Enum):
    RED = "red"
    NONE = None
    TWO = 2


class Home:
    def bound(self, x: int) -> None:
        """A method.

        Args:
            x: A number
        """


def plain(city: str, days: int = 3, share: float = 0.5, short: bool = False) -> str:
    """Tell the weather.

    It may take a while,
    as all things do.

    Args:
        city: The city,
            and its country
        days (int): How many days: at most 9
        share (float, optional): A share

        short:
            In few words
    Returns:
        What is to be expected,
        in words.

    Raises:
        ValueError: If there is none
    """
    return city


def bare() -> None:
    """Do something."""


def containers(
    many: list[int],
    more: list,
    pair: tuple[int, str],
    any_pair: tuple,
    table: dict[str, float],
    any_table: dict,
    deep: list[dict[str, list[int]]],
    anything: Any,
    nothing: None,
) -> dict[str, int]:
    """Take many things.

    Args:
        many: a
        more: b
        pair: c
        any_pair: d
        table: e
        any_table: f
        deep: g
        anything: h
        nothing: i
    """
    return {}


def unions(
    a: int | str,
    b: int | None,
    c: Optional[str],  # noqa: UP045
    d: Union[int, str, float, None],  # noqa: UP007
    e: list[int] | str,
    f: list | tuple,
    g: Literal["x", "y"] | None = None,
    h: Literal[1, "x", None, True] = 1,
    i: Colour = Colour.RED,
    j: list[int] | None = None,
) -> Home:
    """Take one of several things.

    Args:
        a: first
        b: second
        c: third
        d: fourth
        e: fifth
        f: sixth
        g: seventh
        h: eighth
        i: ninth
        j: tenth
    """
    return Home()


def chosen(drink: str, size: int) -> None:
    """Order something to drink.

    Args:
        drink: What to drink (choices: ["tea", " coffee "])
        size: How large (Choices: [1, 2])
    """


FUNCTIONS = [plain, bare, containers, unions, chosen, Home.bound, Home().bound]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__qualname__)
def test_a_model_is_told_what_transformers_tells_it(function: Callable[..., Any]) -> None:
    from transformers.utils import get_json_schema

    tool = function_tool(function)
    assert tool.as_given() == get_json_schema(function)
    assert (tool.name, tool.strict) == (function.__name__, False)


def test_what_may_be_none_is_so_in_json_schema_too() -> None:
    properties = function_tool(unions).schema["properties"]
    assert properties["b"] == {
        "anyOf": [{"type": "integer"}, {"type": "null"}],
        "description": "second",
    }
    assert "nullable" not in str(function_tool(unions).schema)


def undocumented(x: int) -> None:
    pass


def unhinted(x) -> None:  # type: ignore[no-untyped-def]
    """Do.

    Args:
        x: it
    """


def undescribed(x: int) -> None:
    """Do."""


def strange(x: Home) -> None:
    """Do.

    Args:
        x: it
    """


def endless(x: tuple[int, ...]) -> None:
    """Do.

    Args:
        x: it
    """


def several(*x: int) -> None:
    """Do.

    Args:
        x: them
    """


def unknown(x: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Do.

    Args:
        x: it
    """


def no_list(x: str) -> None:
    """Do.

    Args:
        x: it (choices: tea, coffee)
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (undocumented, "the tool undocumented has no docstring.*Write one"),
        (unhinted, "the tool unhinted: the argument x has no type hint. Give it one of int"),
        (undescribed, "the argument x is not in the docstring. Write a line for it under Args"),
        (strange, "the argument x is of type Home, expected int, float"),
        (endless, r"the argument x is of type tuple\[int, \.\.\.\], expected int"),
        (several, "the argument x stands for any number of them. Name each"),
        (unknown, "a type hint is not there .*Nowhere.*Import what it names"),
        (no_list, r"\(choices: tea, coffee\) is no list such as"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_function_that_cannot_be_told_of_is_refused(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        function_tool(function)


def test_literals_of_other_values_are_refused() -> None:
    def wrong(x: Literal[b"bytes"]) -> None:
        """Do.

        Args:
            x: it
        """

    with pytest.raises(RequestError, match=r"the argument x is one of .*expected texts, numbers"):
        function_tool(wrong)
