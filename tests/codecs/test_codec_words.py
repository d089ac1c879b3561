from __future__ import annotations

import pytest

from edge_memllm.cli.main import build_parser
from edge_memllm.codecs import CODEC_WORDS, codec_id, codec_ids, get_codec


@pytest.mark.parametrize("codec", codec_ids())
def test_an_id_stands_for_itself(codec: str) -> None:
    assert codec_id(codec, 256) == codec


@pytest.mark.parametrize(("word", "codec"), CODEC_WORDS.items())
def test_words_stand_for_codecs_there_are(word: str, codec: str) -> None:
    assert codec_id(word, 256) == codec == get_codec(codec).id


@pytest.mark.parametrize(
    ("word", "width", "codec"),
    [
        ("lowrank-50", 256, "lowrank-r128-int8-g32"),
        ("lowrank-50-f16", 2048, "lowrank-r1024-f16"),
        ("lowrank-30-int4", 256, "lowrank-r64-int4-g32"),
        ("lowrank-1", 256, "lowrank-r32-int8-g32"),
        ("lowrank-100-int8", 256, "lowrank-r256-int8-g32"),
        ("lowrank-r96-f16", 256, "lowrank-r96-f16"),
    ],
)
def test_low_rank_is_a_share_of_the_width(word: str, width: int, codec: str) -> None:
    assert codec_id(word, width) == codec


@pytest.mark.parametrize("word", ["zip", "lowrank", "lowrank-0", "lowrank-101", "lowrank-50-nf4"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=rf"table codec '{word}', expected one of f32, f16, bf16"):
        codec_id(word, 256)


def test_the_command_line_names_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser("export").parse_args(["export", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(CODEC_WORDS)}, lowrank-50 or another share of the rank" in shown
    assert codec_id("lowrank-50", 256)
