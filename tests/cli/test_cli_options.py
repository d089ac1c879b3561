"""Options that several commands share."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm.artifact.manifest import UNIFORM_WEIGHTS
from edge_memllm.cli.main import COMMANDS, build_parser, command
from edge_memllm.cli.options import (
    ArgumentField,
    Command,
    Commands,
    add_options,
    argument_fields,
    options_of,
)
from edge_memllm.engine.feeding import PREFILL_CHUNKS, SERVING_CHUNK
from edge_memllm.errors import RequestError
from edge_memllm.interpretation.explaining import key_of_layer
from edge_memllm.loading import LoadOptions
from edge_memllm.modeling.recipe import ConversionRecipe
from edge_memllm.options import byte_size, keywords, layer_list
from edge_memllm_export.weights.quantizer import WEIGHT_FORMS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64000000", 64_000_000),
        ("64MB", 64_000_000),
        ("64M", 64_000_000),
        ("64MiB", 64 << 20),
        ("64 MiB", 64 << 20),
        ("1.5GB", 1_500_000_000),
        ("1.5Gi", 3 << 29),
        ("2kB", 2000),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("7B", 7),
        ("1TB", 10**12),
        ("0", 0),
    ],
)
def test_a_size_is_decimal_or_binary_as_it_says(text: str, expected: int) -> None:
    assert byte_size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "1.MB", "-1MB", "1e6", "64mb", "64XB", "1 2MB", "64iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a size such as 512MB, 1\.5GiB"):
        byte_size(text)


def loading(*words: str) -> dict[str, object]:
    """What `load` is called with, but for the artifact."""
    parser = argparse.ArgumentParser()
    add_options(parser, LoadOptions)
    found = keywords(options_of(LoadOptions, parser.parse_args(["artifact", *words])))
    assert found.pop("path") == Path("artifact")
    return found


def test_left_out_they_are_the_defaults_of_load() -> None:
    parameters = inspect.signature(edge_memllm.load).parameters
    defaults = {name: each.default for name, each in parameters.items() if name != "path"}
    assert loading() == defaults


def test_every_option_reaches_load(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hot words")
    assert loading(
        *("--device", "cuda", "--reader", "direct", "--threads", "3", "--prefill-chunk", "64"),
        *("--record-cache", "64MB", "--hot-text", str(tmp_path / "text")),
        *("--memory-limit", "1GiB", "--vram-limit", "2GB", "--cuda-graph"),
        *("--packed-cache", "cache", "--table-quality", "coarse"),
        *("--overlay", "a", "--overlay", "b"),
    ) == {
        "device": "cuda",
        "reader": "direct",
        "threads": 3,
        "prefill_chunk": 64,
        "table_quality": "coarse",
        "record_cache": 64_000_000,
        "hot_text": "hot words",
        "memory_limit": 1 << 30,
        "vram_limit": 2_000_000_000,
        "cuda_graph": True,
        "packed_cache": Path("cache"),
        "overlays": (Path("a"), Path("b")),
        "export": False,
        "export_options": None,
        "progress": None,
        "memory_share": None,
    }


@pytest.mark.parametrize(
    ("text", "layers"), [("0", (0,)), ("0,3-5", (0, 3, 4, 5)), (" 2 , 2-2", (2, 2))]
)
def test_layers_and_ranges_of_them(text: str, layers: tuple[int, ...]) -> None:
    assert layer_list(text) == layers


@pytest.mark.parametrize("text", ["", "a", "-1", "3-", "5-3", "0-99999", "1,,2"])
def test_what_is_no_list_of_layers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="are no layers, such as 0,3-5"):
        layer_list(text)


def test_a_hot_text_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="byte 0 is not UTF-8 text"):
        loading("--hot-text", str(tmp_path / "text"))


def test_a_graph_is_exported_in_every_form_that_a_manifest_may_name() -> None:
    assert tuple(WEIGHT_FORMS) == UNIFORM_WEIGHTS


def parsers(
    parser: argparse.ArgumentParser, name: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from parsers(inner, f"{name} {word}".strip())


def options() -> Iterator[tuple[str, argparse.ArgumentParser, argparse.Action]]:
    for name, parser in parsers(build_parser()):
        yield from ((name, parser, action) for action in parser._actions if action.option_strings)


# What stands for one value of an option that holds several.
_EXAMPLES = {"--matrix-weights": ("lm_head=int8", "o_proj=int8"), "--cache": ("cold", "warm")}


def holds_several(parser: argparse.ArgumentParser, action: argparse.Action) -> bool:
    """Whether one use of the option gives several values: words, or a list with commas."""
    if action.nargs == "+":
        return True
    first, _ = _EXAMPLES.get(action.option_strings[0], ("1", "2"))
    try:
        value = getattr(used(parser, action, first), action.dest)
    except (argparse.ArgumentError, SystemExit):
        return False
    return isinstance(value, list | tuple | dict) and action.nargs != 2


def used(
    parser: argparse.ArgumentParser, action: argparse.Action, *values: str
) -> argparse.Namespace:
    """What is parsed when only this option is there, once for each value."""
    alone = argparse.ArgumentParser(exit_on_error=False)
    alone._add_action(action)
    required, action.required = action.required, False
    try:
        return alone.parse_args(
            [word for value in values for word in (action.option_strings[0], value)]
        )
    finally:
        action.required = required


def test_an_option_of_several_values_that_is_repeated_loses_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    several = {
        (name, action.option_strings[0]): (parser, action)
        for name, parser, action in options()
        if action.nargs != 0 and holds_several(parser, action)
    }
    assert {("eval", "--text"), ("sweep", "--codecs"), ("train", "--data")} < several.keys()
    for (name, option), (parser, action) in several.items():
        one, other = _EXAMPLES.get(option, ("1", "2"))
        if action.type is key_of_layer:
            one, other = "1:1", "2:2"
        both = getattr(used(parser, action, one, other), action.dest)
        assert len(both) == 2, f"{name} {option}"


def fields() -> Iterator[tuple[str, ArgumentField]]:
    """Every option with the command it is of, as the option classes have it."""
    for name, *_ in COMMANDS:
        found = command(name)
        below = {"": ("", found)} if isinstance(found, Command) else found.below
        for word, (_, each) in below.items():
            for field in argument_fields(each.options):
                yield f"{name} {word}".strip(), field


def test_no_two_options_of_a_command_have_one_name() -> None:
    for name, *_ in COMMANDS:
        found = command(name)
        if not isinstance(found, Commands):
            names = [word for each in argument_fields(found.options) for word in each.names]
            assert len(names) == len(set(names)), name


def real_defaults() -> dict[tuple[str, str], object]:
    """What is taken where an option is left out that is None or nothing by default."""
    conversion = ConversionRecipe()
    chunks = "{cpu}, on CUDA {cuda}".format(**PREFILL_CHUNKS)
    return {
        **{(name, "--prefill-chunk"): chunks for name in ("run", "eval", "bench")},
        ("serve", "--prefill-chunk"): SERVING_CHUNK,
        ("convert", "--beta"): conversion.model["beta"],
        ("convert", "--steps"): conversion.training.steps,
        # Chosen where they are used, and seen in the tests of these:
        ("overlay edit", "--strength"): 1,
        ("bench", "--beta"): 0,
        ("export", "--table-codec"): "int8",
        ("export", "--graph-block"): "128 from 1,024 columns on, else 32",
        ("export", "--graph-method"): "gptq",
        ("sweep", "--graph-weights"): "int8, so that the table is judged and not the graph",
    }


def test_the_defaults_in_the_help_are_those_that_are_taken() -> None:
    real, seen = real_defaults(), set()
    for name, field in fields():
        said = re.search(r"default: ([^);]*)", field.arguments()["help"])
        if said is None:
            continue
        key, default = (name, field.names[0]), field.field.default
        if key in real:
            seen.add(key)
            assert str(real[key]) == said[1], key
        elif default in (None, (), (None,)):
            assert not re.match(r"[\d.]", said[1]), f"{key}: {said[1]}, and nothing here says so"
        else:
            first = re.split(r"[ ,]", said[1])[0]
            assert field.arguments()["type"](first) == default, key
    assert seen == real.keys()
