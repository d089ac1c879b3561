"""The vocabulary file of an export: made where the form of the tokenizer allows, left out else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ExportError
from edge_memllm.text import CONFIG_FILE, TOKENIZER_FILE, VOCABULARY_FILE
from edge_memllm.text.byte_pairs import BytePairTokenizer
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.vocabulary import vocabulary_file
from support.vocabularies import TEXT, changed, gemma_like

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def made(checkpoint: Path, definition: str) -> bytes | None:
    (checkpoint / TOKENIZER_FILE).write_text(definition, encoding="utf-8")
    return vocabulary_file(Checkpoint.open(checkpoint))


@pytest.mark.parametrize(
    "parts",
    [
        {"model__byte_fallback": False},
        {"model__ignore_merges": True},
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "__"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " "}, "content": "▁"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": None},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"decoder": {"type": "Fuse"}},
        {"decoder": None},
    ],
)
def test_a_tokenizer_of_another_form_has_none(checkpoint: Path, parts: dict[str, Any]) -> None:
    assert made(checkpoint, changed(gemma_like(), **parts)) is None


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"pre_tokenizer": None},
        {"post_processor": None},
        {"model__fuse_unk": False},
        {"normalizer": {"type": "Sequence", "normalizers": [REPLACE]}},
    ],
)
def test_a_tokenizer_of_the_form_has_one(checkpoint: Path, parts: dict[str, Any]) -> None:
    assert made(checkpoint, changed(gemma_like(), **parts)) is not None


def test_an_added_token_that_takes_white_space_is_another_form(checkpoint: Path) -> None:
    text = gemma_like().replace('"lstrip": false', '"lstrip": true', 1)
    assert text != gemma_like() and made(checkpoint, text) is None


def test_other_ids_than_the_librarys_are_no_export(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BytePairTokenizer, "decode", lambda self, ids: "other")
    with pytest.raises(ExportError, match="the vocabulary file and the tokenizer differ about"):
        made(checkpoint, gemma_like())


def test_an_artifact_encodes_by_it_with_the_tokens_that_its_configuration_adds(
    checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / TOKENIZER_FILE).write_text(gemma_like(), encoding="utf-8")
    (checkpoint / CONFIG_FILE).write_text('{"image_token": "<image>", "bos_token": "<bos>"}')
    export_model(checkpoint, tmp_path / "out", verify=False)
    library = Tokenizer.from_files(Checkpoint.open(checkpoint).text_file, "checkpoint")
    text = TEXT + "<image><bos>"
    with Artifact.open(tmp_path / "out") as artifact:
        assert VOCABULARY_FILE in artifact.manifest.files
        found = Tokenizer.from_artifact(artifact)
        assert (found.reader, library.reader) == ("vocabulary file", "tokenizers")
        assert found.encode(text) == library.encode(text)
        assert found.definition == library.definition
        assert found.named_tokens == library.named_tokens
        assert found.chat_template is None
