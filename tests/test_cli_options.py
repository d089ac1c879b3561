"""Options that several commands share."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm.cli.options import (
    READERS,
    TABLE_QUALITIES,
    add_loading,
    byte_size,
    layer_list,
    loading_keywords,
)
from edge_memllm.errors import RequestError
from edge_memllm.readers import reader_names
from edge_memllm.table import QUALITIES


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
