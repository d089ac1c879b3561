"""No text has fewer tokens than the bound says, whatever the tokenizer does around it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from edge_memllm.text.long_text import tokens_beyond
from edge_memllm.text.token_bound import TokenBound
from edge_memllm.text.tokenization import Tokenizer as OurTokenizer
from support.checkpoints import raw_byte_tokenizer

_LETTERS = pre_tokenizers.ByteLevel.alphabet()
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Composed of many, decomposed into many, shrunk in UTF-8, white space, what no vocabulary has.
_ODD = "\u1f82\ufdfa\u212b\u03b1\u0313\u0300\u0345\u1100\u1161\u11a8\U0001d400"
_ODD += " \t\n\u00a0\u3000aAbc.,!7"


def byte_level(**parts: Any) -> Tokenizer:
    """Bytes as letters, and a few longer entries."""
    words = ["aa", "aaaa", "ab", "abc", "\u0120a", "\u0120\u0120"]
    merges = [("a", "a"), ("aa", "aa"), ("a", "b"), ("ab", "c"), ("\u0120", "a"), ("\u0120",) * 2]
    vocabulary = {entry: number for number, entry in enumerate([*sorted(_LETTERS), *words])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return with_parts(made, **parts)


def byte_fallback(unknown: str | None = None, **parts: Any) -> Tokenizer:
    """Words with a mark for the space, and bytes for what is not among them."""
    words = ["\u2581", "a", "b", "\u2581a", "aa", "aaa"]
    vocabulary = {entry: number for number, entry in enumerate([*_BYTES, *words])}
    merges = [("\u2581", "a"), ("a", "a"), ("aa", "a")]
    made = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token=unknown, fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return with_parts(made, **parts)


def with_parts(made: Tokenizer, **parts: Any) -> Tokenizer:
    for name, part in parts.items():
        if name == "added":
            made.add_tokens(part)
        else:
            setattr(made, name, part)
    return made


def around(template: str) -> Any:
    return processors.TemplateProcessing(single=template, special_tokens=[("a", 5)])


BOUNDED = {
    "bytes": (byte_level(), 4),
    "composed": (byte_level(normalizer=normalizers.NFC()), 16),
    "folded": (
        byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        16,
    ),
    "decomposed": (byte_level(normalizer=normalizers.NFKD()), 4),
    "shortened": (byte_level(normalizer=normalizers.Replace("abc", "a")), 12),
    "split": (
        byte_level(
            pre_tokenizer=pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\s+"), "isolated"),
                    pre_tokenizers.Digits(),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        ),
        4,
    ),
    "added": (byte_level(added=["abcabcabc"]), 9),
    "an added one that is normalized": (
        byte_level(normalizer=normalizers.NFKD(), added=[AddedToken("\ufdfa", normalized=True)]),
        18,
    ),
    "around": (byte_level(post_processor=around("a $A a")), 4),
    "fallback": (byte_fallback(), 6),
    "fallback where nothing is unknown": (byte_fallback(unknown="a"), 6),
    "one for each unknown": (
        with_parts(Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?"))),
        1,
    ),
}
UNBOUNDED = {
    "stripped": byte_level(normalizer=normalizers.Strip()),
    "accents taken off": byte_level(normalizer=normalizers.StripAccents()),
    "a pattern": byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "deleted": byte_level(normalizer=normalizers.Replace("a", "")),
    "white space dropped": byte_fallback(pre_tokenizer=pre_tokenizers.Whitespace()),
    "cut out": byte_fallback(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
    "spaces taken along": byte_level(added=[AddedToken("<m>", lstrip=True)]),
    "unknown joined": Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True)),
    "unknown left out": Tokenizer(models.BPE({"a": 0}, [])),
    "a byte missing": Tokenizer(
        models.BPE({each: n for n, each in enumerate(_BYTES[1:])}, [], byte_fallback=True)
    ),
    "whole words": Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")),
    "pieces of words": Tokenizer(models.WordPiece({"a": 0, "?": 1}, unk_token="?")),
    "likeliest pieces": Tokenizer(models.Unigram([("a", 0.0), ("?", -1.0)], unk_id=1)),
    "the text left out": byte_level(post_processor=around("a")),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_no_text_has_fewer_tokens(name: str) -> None:
    tokenizer, characters = BOUNDED[name]
    bound = TokenBound.of(tokenizer.to_str())
    assert bound.characters == characters

    @settings(max_examples=150, deadline=None)
    @given(
        st.one_of(
            st.text(st.sampled_from(_ODD), max_size=80),
            st.text(max_size=40),
            st.integers(0, 90).map("a".__mul__),
            st.integers(0, 30).map("abc".__mul__),
            st.integers(0, 30).map("\u03b1\u0313\u0300\u0345".__mul__),
        )
    )
    def holds(text: str) -> None:
        assert bound.fewest(len(text)) <= len(tokenizer.encode(text).ids)

    holds()


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_drops_or_joins_without_a_limit_has_no_bound(name: str) -> None:
    bound = TokenBound.of(UNBOUNDED[name].to_str())
    assert bound.characters is None
    assert bound.fewest(1 << 40) == 0


def test_what_has_more_tokens_is_told_without_looking_at_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = OurTokenizer(raw_byte_tokenizer().to_str().encode())
    text = "word " * 200_000
    seen: list[int] = []
    encode = OurTokenizer.encode

    def noting(self: OurTokenizer, text: str, *, special: bool = True) -> list[int]:
        seen.append(len(text))
        return encode(self, text, special=special)

    monkeypatch.setattr(OurTokenizer, "encode", noting)
    found = tokens_beyond(tokenizer, text, 1000)
    assert found is not None
    assert 1000 < found < 300_000
    assert sum(seen) < 300_000
    assert tokens_beyond(tokenizer, text, 2_000_000) is None
    assert tokens_beyond(tokenizer, "x" * 7, 7) is None
    assert tokens_beyond(tokenizer, "x" * 8, 7) == 8
