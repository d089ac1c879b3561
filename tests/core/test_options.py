"""Option classes: functions that are called with their fields, and parsers made of them."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

import pytest

from edge_memllm.artifact.manifest import KV_DTYPES
from edge_memllm.cli.options import add_options, argument_fields, options_of
from edge_memllm.errors import RequestError
from edge_memllm.loading import LoadOptions
from edge_memllm.options import Group, Option, byte_size, called_with, closed_choices, keywords
from edge_memllm.options.export import GRAPH_FORMS, ExportOptions


@dataclass(frozen=True)
class Inner:
    """Options that another class has below a heading."""

    where: Annotated[Path, Option("a place")]
    _: KW_ONLY
    size: Annotated[int, Option("how much", parse=byte_size)] = 2 << 20
    hidden: int = 7


@dataclass(frozen=True, kw_only=True)
class Outer:
    """All kinds of options."""

    inner: Annotated[Inner, Group("inside", unset={"size": "little"})]
    text: Annotated[str | None, Option("words", reads_text=True)] = None
    tags: Annotated[tuple[str, ...], Option("names", "TAG", parse=str, several="repeated")] = ()
    check: Annotated[bool, Option("do not look", flag="--no-check", needs=("--tags",))] = True


def parsed(*words: str, left_out: Outer | None = None) -> Outer:
    parser = argparse.ArgumentParser()
    add_options(parser, Outer)
    return options_of(Outer, parser.parse_args(words), left_out)


def test_what_is_left_out_is_as_the_class_says() -> None:
    assert parsed("here") == Outer(inner=Inner(Path("here")))


def test_what_is_given_reaches_the_fields(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("some words", encoding="utf-8")
    found = parsed(
        *("here", "--size", "3kB", "--text", str(tmp_path / "words")),
        *("--tags", "a", "--tags", "b", "--no-check"),
    )
    inner = Inner(Path("here"), size=3000)
    assert found == Outer(inner=inner, text="some words", tags=("a", "b"), check=False)


def test_an_object_says_what_was_left_out() -> None:
    before = Outer(inner=Inner(Path("here"), size=5, hidden=9), tags=("a",))
    after = parsed("there", "--tags", "b", left_out=before)
    assert after == Outer(inner=Inner(Path("there"), size=5, hidden=9), tags=("b",))


def test_an_option_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--no-check has no effect without --tags. Give --tags"):
        parsed("here", "--no-check")


def test_the_help_has_the_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Outer)
    assert "--size SIZE  how much (default: little)" in parser.format_help()
    alone = argparse.ArgumentParser()
    add_options(alone, Inner)
    assert "--size SIZE  how much (default: 2MiB)" in alone.format_help()
    assert "hidden" not in alone.format_help()


def test_a_function_takes_the_fields_of_its_options() -> None:
    @called_with(Inner)
    def call(options: Inner) -> str:
        """Say it."""
        return f"{options.where} {options.size} {options.hidden}"

    assert call(Path("x"), hidden=1) == f"x {2 << 20} 1"
    assert call(**keywords(Inner(Path("y"), size=3))) == "y 3 7"
    assert inspect.getdoc(call) == "Say it."
    assert str(inspect.signature(call)).startswith("(where: pathlib")
    assert inspect.signature(call).parameters["size"].annotation is int
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        call(Path("x"), colour=1)


def test_a_wrong_call_is_told_in_the_name_of_the_function() -> None:
    @called_with(Inner)
    def measure(options: Inner) -> Inner:
        return options

    with pytest.raises(
        TypeError, match=r"^measure\(\) got an unexpected keyword argument 'nonsense'"
    ):
        measure(nonsense=1)  # type: ignore[call-arg]


def test_types_that_leave_a_choice_say_which() -> None:
    export = {each.field.name: each for each in argument_fields(ExportOptions)}
    assert export["graph_weights"].choices == GRAPH_FORMS
    assert export["kv_dtype"].choices == KV_DTYPES
    assert export["device"].choices == ("cpu", "cuda")
    assert export["graph_block"].choices is None
    assert closed_choices(str | None) == ()


@pytest.mark.parametrize("options", [ExportOptions, LoadOptions])
def test_choices_stand_once(options: type) -> None:
    for each in argument_fields(options):
        assert each.option.choices is None, f"{each.field.name}: its type says so"
