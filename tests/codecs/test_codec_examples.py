"""The worked examples of docs/codecs.md are what the code does: the bytes never change."""

from __future__ import annotations

import re

import numpy as np
import pytest

from edge_memllm.codecs import CODEC_WORDS, codec_ids, get_codec
from edge_memllm.codecs.levels import INT2_LEVELS as INT2
from edge_memllm.codecs.levels import INT3_LEVELS as INT3
from edge_memllm.codecs.levels import NF4_LEVELS as NF4
from support import ROOT

PAGE = (ROOT / "docs" / "codecs.md").read_text("utf-8")
ROW = np.array([0.0, 1.0, -2.0, 0.5] + [0.0] * 28, np.float32).reshape(1, 1, 32)
LEVELS4 = (-109, -86, -67, -52, -39, -26, -14, -3, 8, 20, 32, 45, 60, 77, 98, 127)
PARAMETERS = {
    "codebook4-g32": np.array(LEVELS4, np.int8).tobytes(),
    "codebook3-g32": np.array(INT3, np.int8).tobytes(),
    "codebook2-g32": np.array(INT2, np.int8).tobytes(),
    "lowrank-r32-int8-g32": np.eye(32, dtype="<f2").tobytes(),
}
_LINE = re.compile(
    r"^\| `([a-z0-9-]+)` \| `([^`]+)` \| `([^`]+)` \| ([-\d., e]+) \|$", re.MULTILINE
)
EXAMPLES = _LINE.findall(PAGE)


def expanded(text: str) -> bytes:
    """Bytes of hex digits where ``xx*n`` is a byte n times and ``-`` is none."""
    parts = [] if text == "-" else text.split()
    return b"".join(
        bytes.fromhex(part.partition("*")[0]) * int(part.partition("*")[2] or 1) for part in parts
    )


@pytest.mark.parametrize(("codec_id", "scales", "codes", "values"), EXAMPLES)
def test_bytes_are_those_of_the_document(
    codec_id: str, scales: str, codes: str, values: str
) -> None:
    codec = get_codec(codec_id).with_parameters(PARAMETERS.get(codec_id, b""), 1, 32)
    found = codec.encode(ROW)
    assert (found[0].tobytes(), found[1].tobytes()) == (expanded(scales), expanded(codes))
    decoded = codec.decode(*found, 1, 32)[0, 0]
    expected = np.array([float(value) for value in values.split(",")])
    np.testing.assert_allclose(decoded[:4], expected, rtol=1e-8)
    assert (decoded[4:] == decoded[0]).all()


def test_every_codec_has_an_example() -> None:
    families = {re.sub(r"-[gr]\d+.*", "", example[0]) for example in EXAMPLES}
    assert families == {re.sub(r"-g\d+", "", each) for each in codec_ids()} - {"none"} | {"lowrank"}


@pytest.mark.parametrize("levels", [NF4, INT3, INT2, LEVELS4])
def test_levels_are_those_of_the_document(levels: tuple[int, ...]) -> None:
    assert ", ".join(map(str, levels)) in " ".join(PAGE.split())


def test_every_word_is_explained() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    for word, codec in CODEC_WORDS.items():
        explained = [line for line in lines if f"`{word}`" in line]
        assert any(f"`{codec}`" in line for line in explained), word


@pytest.mark.parametrize(("codec_id", "miss"), [("nf4", 19.5), ("int3", 48.8), ("int2", 75.15)])
def test_bounds_are_those_of_the_document(codec_id: str, miss: float) -> None:
    assert get_codec(f"{codec_id}-g32").miss == pytest.approx(miss)
    assert f"({miss:g} + u) s(127)" in PAGE
