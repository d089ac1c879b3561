from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm import RequestError
from edge_memllm.text import long_text
from edge_memllm.text.long_text import long_text_tokens
from edge_memllm.text.tokenization import Tokenizer
from support import ROOT
from support.small_model import byte_tokenizer

SHIPPED = ROOT / "examples" / "tiny-english" / "tokenizer.json"
TEXTS = st.text(st.sampled_from("ab.' \n\té"), max_size=80)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(SHIPPED.read_bytes())


@given(text=TEXTS, block=st.integers(1, 20))
def test_blocks_change_no_token(tokenizer: Tokenizer, text: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "BLOCK", block)
        found = long_text_tokens(tokenizer, text, 8192)
    assert found.tolist() == tokenizer.encode(text, special=False)


def test_no_block_is_long(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = tokenizer.encode

    def noting(text: str, *, special: bool) -> list[int]:
        seen.append(len(text))
        return encode(text, special=special)

    monkeypatch.setattr(long_text, "BLOCK", 400)
    monkeypatch.setattr(tokenizer, "encode", noting)
    long_text_tokens(tokenizer, "It was a dark and stormy night.\n" * 100, 8192)
    assert max(seen) < 450


def test_a_text_that_cannot_be_cut_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that looks at the whole text: its tokens change wherever it is cut."""
    tokenizer = byte_tokenizer()
    encode = tokenizer.encode
    monkeypatch.setattr(long_text, "BLOCK", 10)
    monkeypatch.setattr(tokenizer, "encode", lambda text, special: [*encode(text), len(text) % 7])
    text = "one two three four five"
    assert long_text_tokens(tokenizer, text, 300).tolist() == [*encode(text), len(text) % 7]


def test_ids_are_checked(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="expected an integer from 0 to 9"):
        long_text_tokens(tokenizer, "night", 10)
