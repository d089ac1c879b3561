"""From text to tokens: documents, the tokenizers made for them, and windows to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.artifact.atomic import WholeFile
from edge_memllm.errors import RecipeError
from edge_memllm.modeling.data import (
    END_OF_TEXT,
    TokenWindows,
    byte_tokenizer,
    documents,
    train_tokenizer,
    write_tokens,
)
from edge_memllm.modeling.recipe import DataRecipe

SENTENCES = [
    f"= title {i} =\nThe cat number {i} sat on the mat and saw {i * 7}.\n" for i in range(200)
]
TRAINED = train_tokenizer(SENTENCES, 400)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(SENTENCES), encoding="utf-8")
    return str(path)


class TestCorpus:
    def test_documents_of_plain_text(self, text: str) -> None:
        whole = list(documents([text], DataRecipe()))
        split = list(documents([text], DataRecipe(document_start="^= .+ =$")))
        assert whole == ["".join(SENTENCES)]
        assert split == SENTENCES

    def test_documents_of_json_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
        assert list(documents([str(path)], DataRecipe())) == ["one", "two"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 1: expected a JSON object"),
            ("[" * 99_999, "line 1: expected a JSON object .*RecursionError"),
            ('{"text": ' + "9" * 9_999 + "}", "line 1: expected a JSON object .*ValueError"),
            ('{"body": "x"}', "line 1: expected a JSON object with a 'text' field"),
            ('{"text": 3}', "line 1: 'text' is not text that can be written as UTF-8"),
            ('{"text": "\\ud83d"}', "line 1: 'text' is not text that can be written as UTF-8"),
        ],
    )
    def test_bad_json_lines(self, tmp_path: Path, line: str, message: str) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(line + "\n")
        with pytest.raises(RecipeError, match=message):
            list(documents([str(path)], DataRecipe()))

    def test_unreadable_files(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"none\.txt: cannot be read"):
            list(documents([str(tmp_path / "none.txt")], DataRecipe()))
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        with pytest.raises(RecipeError, match="not UTF-8"):
            list(documents([str(tmp_path / "latin.txt")], DataRecipe()))

    def test_windows_tile_the_packed_documents(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer(300)
        path = tmp_path / "tokens.npy"
        with WholeFile(path) as file:
            count = write_tokens(["abc", "defgh"], tokenizer, 0, file)
            file.publish()
        tokens = np.load(path)
        assert count == len(tokens) == 10
        assert tokens[0] == tokens[4] == 0
        windows = TokenWindows(path, 4)
        assert len(windows) == 2
        joined = torch.cat([windows[i]["input_ids"] for i in range(2)])
        assert joined.tolist() == tokens[:8].tolist()
        led = TokenWindows(path, 4, boundary_first=True)
        assert len(led) == 3
        assert all(int(led[i]["input_ids"][0]) == 0 for i in range(3))
        joined = torch.cat([led[i]["labels"][1:] for i in range(3)])
        assert joined.tolist() == tokens[:9].tolist()


class TestTokenizer:
    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=60))
    def test_any_text_round_trips(self, text: str) -> None:
        for tokenizer in (TRAINED, byte_tokenizer(300)):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text

    def test_end_of_text_is_token_zero(self) -> None:
        assert TRAINED.token_to_id(END_OF_TEXT) == 0
        assert TRAINED.get_vocab_size() == 400

    def test_too_small_vocabulary(self) -> None:
        with pytest.raises(RecipeError, match="vocab_size is 256; a byte-level"):
            train_tokenizer(SENTENCES, 256)
        with pytest.raises(RecipeError, match="vocab_size is 256; a byte vocabulary"):
            byte_tokenizer(256)
