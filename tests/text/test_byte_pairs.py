from __future__ import annotations

import json
import random
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_memllm.errors import ArtifactError
from edge_memllm.text.byte_pairs import BytePairTokenizer
from edge_memllm.text.tokenization import Detokenizer, Tokenizer
from edge_memllm.text.tokenizer_file import TokenizerConfig
from edge_memllm.text.vocabulary import (
    Columns,
    Rules,
    Vocabulary,
    columns,
    vocabulary_bytes,
)
from support.vocabularies import TEXT, gemma_like

RULES = Rules(" ", "▁", "▁", " ", (), ())
DIGESTS = {"tokenizer.json": "0" * 64}


@cache
def library() -> Tokenizer:
    return Tokenizer(gemma_like().encode())


@cache
def ours() -> Tokenizer:
    return Tokenizer(BytePairTokenizer(Vocabulary(gemma_file(), "v", DIGESTS), gemma_like))


@cache
def gemma_file() -> bytes:
    fields = json.loads(gemma_like())
    model, added = fields["model"], fields["added_tokens"]
    ids = model["vocab"]
    merges = {
        (ids[left], ids[right]): (rank, ids[left + right])
        for rank, (left, right) in enumerate(model["merges"])
    }
    special = [each["id"] for each in added if each["special"]]
    content = columns(list(ids), merges, [each["id"] for each in added], special)
    rules = Rules(" ", "▁", "▁", " ", before=(ids["<bos>"],), after=())
    return vocabulary_bytes(rules, content, DIGESTS)


def pieces(*more: str) -> st.SearchStrategy[str]:
    """Texts of what the vocabulary knows, bit by bit, and of what it does not."""
    words = [*json.loads(gemma_like())["model"]["vocab"], *TEXT, " ", "  ", "\n\n\n\n", *more]
    return st.lists(st.sampled_from(words) | st.text(max_size=3), max_size=30).map("".join)


@settings(deadline=None, max_examples=100)
@given(pieces("<h", "1>", "<turn", "|>", "▁", "\U0001f642"))
@example(TEXT)
@example("")
@example("\n" * 7 + "<h1><h1<h<turn|>")
@example("<h")
@example("the" * 60)
@example(" " * 100)
def test_ids_and_texts_are_those_of_the_library(text: str) -> None:
    for special in (True, False):
        ids = library().encode(text, special=special)
        assert ours().encode(text, special=special) == ids
        assert ours().decode(ids) == library().decode(ids)


@settings(deadline=None)
@given(st.lists(st.integers(-3, 700), max_size=20))
def test_any_ids_decode_as_the_library_does(ids: list[int]) -> None:
    ids = [token for token in ids if token >= 0]
    assert ours().decode_at_once(ids) == library().decode_at_once(ids)
    assert ours().decode(ids) == library().decode(ids)
    detokenizer = Detokenizer(ours())
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == library().decode(ids)


def test_entries_are_those_of_the_library() -> None:
    size = len(json.loads(gemma_like())["model"]["vocab"])
    for token in range(-2, size + 2):
        spelling = ours().spelling(token)
        expected = library().spelling(token) if token >= 0 else None
        assert spelling == expected
        assert ours().token(spelling or "no such") == (token if spelling else None)
        if token >= 0:
            assert ours().is_silent(token) == library().is_silent(token)
            assert ours().bytes_of(token) == library().bytes_of(token)
    assert ours().token("\ud800") is None and ours().token("\U0010ffff") is None
    assert ours().beginning == library().beginning == [library().token("<bos>")]
    assert ours().definition == gemma_like()
    assert ours().bound.characters == library().bound.characters


def test_a_text_of_many_blocks_is_cut_as_one() -> None:
    generator = random.Random(0)
    words = [*TEXT.split(" "), "\n\n", "\U0001f642", "<turn|>"]
    text = " ".join(generator.choices(words, k=40_000))
    assert len(text) > 2 << 16
    assert ours().encode(text) == library().encode(text)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_merges_of_any_rank_are_made_in_the_librarys_order(data: st.DataObject) -> None:
    """Ranks drawn at random: what is merged may be below what it is made of."""
    from tokenizers import models

    letters = ["a", "b", "c"]
    texts = [left + right for left in letters for right in letters]
    texts += data.draw(st.lists(st.text("abc", min_size=3, max_size=5), max_size=8, unique=True))
    ids = {each: token for token, each in enumerate(letters + texts)}
    splits = [(t[:cut], t[cut:]) for t in texts for cut in range(1, len(t))]
    merges = data.draw(st.permutations([each for each in splits if set(each) <= ids.keys()]))
    text = data.draw(st.text("abc", max_size=20))
    expected = [each.id for each in models.BPE(ids, merges).tokenize(text)]
    names = [*ids, *(f"<0x{byte:02X}>" for byte in range(256))]
    table = {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in enumerate(merges)}
    file = vocabulary_bytes(RULES, columns(names, table, [], []), DIGESTS)
    found = BytePairTokenizer(Vocabulary(file, "v", DIGESTS), str)
    assert found.encode(text, special=False) == expected


def test_tokens_that_a_configuration_names_are_known_to_the_template() -> None:
    config = TokenizerConfig({"bos_token": "<bos>"}, {})
    named = Tokenizer(
        BytePairTokenizer(Vocabulary(gemma_file(), "v", DIGESTS), gemma_like), config=config
    )
    assert named.named_tokens == {"bos_token": "<bos>"}


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_changed_file_is_refused_or_harmless(data: st.DataObject) -> None:
    file = bytearray(gemma_file())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(file) - 1))
        file[place] = data.draw(st.integers(0, 255))
    try:
        found = BytePairTokenizer(Vocabulary(bytes(file), "v", DIGESTS), gemma_like)
    except ArtifactError as error:
        assert str(error).startswith("v: ")
        return
    found.decode(found.encode(TEXT, special=True))
    assert found.bound.characters is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [("ends", 0), ("order", 1), ("pairs", 0), ("merges", 1 << 31), ("letters", 1)],
)
def test_columns_that_lead_astray_are_refused(name: str, value: int) -> None:
    good = Vocabulary(gemma_file(), "v", DIGESTS)
    column = getattr(good.columns, name).copy()
    column[1:3] = value
    file = vocabulary_bytes(good.rules, good.columns._replace(**{name: column}), DIGESTS)
    with pytest.raises(ArtifactError, match=f"v: its {name} cannot be"):
        Vocabulary(file, "v", DIGESTS)


def test_an_end_amid_a_letter_is_refused() -> None:
    good = Vocabulary(gemma_file(), "v", DIGESTS)
    ends = good.columns.ends.copy()
    ends[good.token("東")] -= 1
    file = vocabulary_bytes(good.rules, good.columns._replace(ends=ends), DIGESTS)
    with pytest.raises(ArtifactError, match="its ends cannot be"):
        Vocabulary(file, "v", DIGESTS)


def test_a_vocabulary_of_another_tokenizer_is_refused() -> None:
    with pytest.raises(ArtifactError, match="not made of the tokenizer beside it"):
        Vocabulary(gemma_file(), "v", {"tokenizer.json": "1" * 64})


def test_a_vocabulary_without_bytes_is_refused() -> None:
    file = vocabulary_bytes(RULES, columns(["a", "b"], {}, [], []), {})
    with pytest.raises(ArtifactError, match="256 bytes have no entry"):
        BytePairTokenizer(Vocabulary(file, "v", {}), str)


def test_a_cut_file_is_refused() -> None:
    with pytest.raises(ArtifactError, match="bytes, expected"):
        Vocabulary(gemma_file()[:-1], "v", DIGESTS)
    assert Columns._fields[0] == "pairs"
