"""Options that several commands share."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm.cli.analysis.explain import _key
from edge_memllm.cli.main import build_parser
from edge_memllm.cli.options import (
    READERS,
    TABLE_QUALITIES,
    add_loading,
    byte_size,
    layer_list,
    loading_keywords,
)
from edge_memllm.errors import RequestError
from edge_memllm.feeding import PREFILL_CHUNKS, SERVING_CHUNK
from edge_memllm.interpretation.explaining import Questions
from edge_memllm.interpretation.suppression import Wish
from edge_memllm.modeling.recipe import ConversionRecipe
from edge_memllm.readers import reader_names
from edge_memllm.table.table import QUALITIES


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


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_loading(parser)
    return parser.parse_args(words)


def test_left_out_they_are_the_defaults_of_load() -> None:
    parameters = inspect.signature(edge_memllm.load).parameters
    others = {"path", "progress"}  # of every command's own
    defaults = {name: each.default for name, each in parameters.items() if name not in others}
    assert loading_keywords(parsed()) == defaults


def test_every_option_reaches_load(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hot words")
    given = parsed(
        *("--device", "cuda", "--reader", "direct", "--threads", "3", "--prefill-chunk", "64"),
        *("--record-cache", "64MB", "--hot-text", str(tmp_path / "text")),
        *("--memory-limit", "1GiB", "--vram-limit", "2GB", "--cuda-graph"),
        *("--packed-cache", "cache", "--table-quality", "coarse"),
        *("--overlay", "a", "--overlay", "b"),
    )
    assert loading_keywords(given) == {
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
        loading_keywords(parsed("--hot-text", str(tmp_path / "text")))


def test_the_readers_are_those_there_are() -> None:
    assert reader_names() == READERS


def test_the_qualities_are_those_there_are() -> None:
    assert QUALITIES == TABLE_QUALITIES


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
        if action.type is _key:
            one, other = "1:1", "2:2"
        both = getattr(used(parser, action, one, other), action.dest)
        assert len(both) == 2, f"{name} {option}"


def real_defaults() -> dict[tuple[str, str], object]:
    """What is taken where an option is left out, of those that argparse has no default of."""
    conversion, questions = ConversionRecipe(), Questions()
    chunks = "{cpu}, on CUDA {cuda}".format(**PREFILL_CHUNKS)
    return {
        **{(name, "--prefill-chunk"): chunks for name in ("run", "eval", "bench")},
        ("serve", "--prefill-chunk"): SERVING_CHUNK,
        ("convert", "--beta"): conversion.model["beta"],
        ("convert", "--steps"): conversion.training.steps,
        ("explain", "--keys"): questions.strongest,
        ("explain", "--count"): questions.count,
        ("explain", "--seed"): questions.seed,
        ("suppress", "--most"): Wish(words=()).most,
        # Chosen where they are used, and seen in the tests of these:
        ("suppress", "--seed"): 0,
        ("overlay edit", "--strength"): 1,
        ("bench", "--context"): 128,
        ("bench", "--beta"): 0,
        ("bench", "--cache"): "warm",
        ("export", "--table-codec"): "int8",
        ("export", "--graph-block"): "128 from 1,024 columns on, else 32",
        ("export", "--graph-method"): "gptq for int4, rtn for int8",
        ("sweep", "--graph-weights"): "int8, so that the table is judged and not the graph",
    }


def test_the_defaults_in_the_help_are_those_that_are_taken() -> None:
    real, seen = real_defaults(), set()
    for name, _, action in options():
        said = re.search(r"default: ([^);]*)", action.help or "")
        if said is None:
            continue
        key = name, action.option_strings[0]
        if key in real:
            seen.add(key)
            assert str(real[key]) == said[1], key
        elif action.default is None or action.default == []:
            assert not re.match(r"[\d.]", said[1]), f"{key}: {said[1]}, and nothing here says so"
        else:
            first = re.split(r"[ ,]", said[1])[0]
            assert (action.type or str)(first) == action.default, key
    assert seen == real.keys()
