"""Options: what may be asked, told once for Python and for the command line.

An option class is a frozen dataclass. The name of a field is a keyword of Python and, with dashes,
an option of the command line; a field that may be given by its place is an argument of both, unless
its option has a name of its own. The default is the default of both. An `Option` in the annotation
says what only the command line needs: the help, and how words become a value. A field without one
is for Python alone.

`called_with` makes functions that take the fields of such a class; `edge_memllm.cli.options` makes
parsers of them.
"""

from __future__ import annotations

import functools
import inspect
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Parameters = ParamSpec("Parameters")
Options = TypeVar("Options")
Result = TypeVar("Result")

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)

_MOST_LAYERS = 1024
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?B?)")
_FACTORS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4} | {
    "ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
}


@dataclass(frozen=True, slots=True)
class Option:
    """A field as the command line shows it.

    The help ends with the default, unless that is nothing; `unset` says what None stands for then,
    and `%(default)s` in the help is another place for it.
    """

    help: str
    # None: N for a whole number, X for another, FILE for a path, the name for an argument ...
    metavar: str | tuple[str, ...] | None = None
    parse: Callable[[str], Any] | None = None  # one word to a value; None: as the field's type
    choices: tuple[str, ...] | None = None  # None: as the field's type is a Literal, or free
    # A field of several values: "repeated" takes one word each time, "words" any number of them,
    # "list" one word that `parse` makes a tuple of. All may be given several times.
    # A number is that of the words of its only use.
    several: Literal["repeated", "words", "list"] | int | None = None
    collect: Callable[[Iterable[Any]], Any] = tuple  # what becomes of several values
    reads_text: bool = False  # the command line names a file, the value is its text
    flag: str | None = None  # None: the field's name; --no-... turns a field off that is on
    also: tuple[str, ...] = ()  # further names
    unset: str | None = None
    group: str | None = None  # the heading it stands under
    one_of: str | None = None  # of the options with the same word here, one may be given
    required: bool = False  # where one_of has no default: one must be given
    needs: tuple[
        str, ...
    ] = ()  # options such as --text of which one must be given, or this has no effect


@dataclass(frozen=True, slots=True)
class Group:
    """A field that is an option class itself: its options stand under a heading of their own."""

    title: str | None = None  # None: among the others
    description: str | None = None
    without: Mapping[str, Any] = field(default_factory=dict)  # not asked for; what they are instead
    unset: Mapping[str, str] = field(default_factory=dict)  # other words for what None stands for


def called_with(
    options: Callable[Parameters, Options],
) -> Callable[[Callable[[Options], Result]], Callable[Parameters, Result]]:
    """Make a function of one option class into one that takes the fields of that class.

    What it makes has the signature of the class: its keywords, types and defaults.
    """

    def decorate(function: Callable[[Options], Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*values: Parameters.args, **named: Parameters.kwargs) -> Result:
            try:
                asked = options(*values, **named)
            except TypeError as error:  # in the name of what was called, as Python would say it
                made = f"{options.__name__}.__init__"
                raise TypeError(str(error).replace(made, function.__name__)) from None
            return function(asked)

        returned = inspect.signature(function).return_annotation
        signature = signature_of(options).replace(return_annotation=returned)
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def signature_of(options: Callable[..., Any]) -> inspect.Signature:
    """Return the parameters of an option class with their types alone, as a reader wants them.

    Any other callable keeps the signature it has.
    """
    found = inspect.signature(options)
    if not isinstance(options, type):
        return found
    types = get_type_hints(options)
    return found.replace(
        parameters=[each.replace(annotation=types[each.name]) for each in found.parameters.values()]
    )


def keywords(options: DataclassInstance) -> dict[str, Any]:
    """Return the fields by name, as the function that is called with them takes them."""
    return {each.name: getattr(options, each.name) for each in fields(options)}


def closed_choices(kind: Any) -> tuple[str, ...]:
    """Return the texts that a type leaves the choice of: of Literals, or of a union with some."""
    if get_origin(kind) is Literal:
        return tuple(each for each in get_args(kind) if isinstance(each, str))
    return tuple(text for each in get_args(kind) for text in closed_choices(each))


def positive_int(text: str) -> int:
    """Parse a whole number of at least one."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{text} is not a positive number")
    return value


def positive_ints(text: str) -> tuple[int, ...]:
    """Parse whole numbers of at least one, with commas between them."""
    return tuple(positive_int(word) for word in text.split(",") if word)


def positive_number(text: str) -> float:
    """Parse a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number above zero")
    return value


def byte_size(text: str) -> int:
    """Parse bytes, as ``64000000``, ``64MB`` (decimal) or ``61.1MiB`` (binary)."""
    found = _SIZE.fullmatch(text.strip())
    unit = "" if found is None else found[2].removesuffix("B").replace("K", "k")
    if found is None or unit not in _FACTORS:
        raise ArgumentTypeError(f"{text!r} is not a size such as 512MB, 1.5GiB or 64000000")
    return round(float(found[1]) * _FACTORS[unit])


def layer_list(text: str) -> tuple[int, ...]:
    """Parse layers and ranges of layers with commas between, as ``0,3-5``."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < _MOST_LAYERS):
            raise ArgumentTypeError(f"{text!r} are no layers, such as 0,3-5")
        layers += range(int(first), int(last) + 1)
    return tuple(layers)
