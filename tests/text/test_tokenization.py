from __future__ import annotations

import json
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.text.tokenization import Detokenizer, Tokenizer
from support.checkpoints import BOS, EOS, VOCABULARY, raw_byte_tokenizer
from support.small_model import byte_tokenizer, write_small_artifact

TEXT = "The naïve café — 東京 is far; the river is not. 🙂 The the  then, there.\n\tHello hello!"


@pytest.fixture(scope="module")
def word_tokenizer() -> Tokenizer:
    """Byte-level BPE with merges, so that tokens carry leading spaces and parts of characters."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT] * 5, trainer)
    return Tokenizer(library.to_str().encode())


@pytest.fixture(scope="module")
def sentence_tokenizer() -> Tokenizer:
    """Pieces with a mark for the space and bytes for the rest, as SentencePiece models have."""
    pieces = ["▁", "▁the", "a", "▁a", "b", "▁b", "!"] + [f"<0x{byte:02X}>" for byte in range(256)]
    library = Library(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(library.to_str().encode())


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=30))
@example([0xE4 - 0x20] * 3)
@example([BOS, EOS, BOS])
def test_pieces_of_any_ids_are_the_decoded_whole(ids: list[int]) -> None:
    tokenizer = byte_tokenizer()
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None)
@given(st.data())
def test_pieces_of_merged_tokens_are_the_decoded_whole(
    word_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, 399), max_size=20))
    assert "".join(pieces_of(word_tokenizer, ids)) == word_tokenizer.decode(ids)


@settings(deadline=None)
@given(st.text(max_size=20))
@example(TEXT)
@example("\ufffd")
def test_no_piece_of_a_text_ends_inside_a_character(word_tokenizer: Tokenizer, text: str) -> None:
    pieces = pieces_of(word_tokenizer, word_tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_come_as_early_as_they_are_certain(word_tokenizer: Tokenizer) -> None:
    ids = word_tokenizer.encode(" the then")
    pieces = pieces_of(word_tokenizer, ids)
    assert pieces[:-1] == [word_tokenizer.decode([token]) for token in ids]
    assert pieces[-1] == ""


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=20))
def test_spaces_between_pieces_survive(sentence_tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(sentence_tokenizer, ids)) == sentence_tokenizer.decode(ids)


@settings(deadline=None)
@given(st.text("aé東🙂", min_size=1, max_size=6))
def test_characters_spelt_in_bytes_wait_until_they_are_whole(
    sentence_tokenizer: Tokenizer, text: str
) -> None:
    pieces = pieces_of(sentence_tokenizer, [7 + byte for byte in text.encode()])
    assert "".join(pieces) == text
    assert all(piece in (*text, "") for piece in pieces)


def library_of(kind: str) -> Library:
    """A tokenizer without merges, of the named way to decode."""
    letters = ["▁", "▁the", "a", "▁a", "##b", ".", "n", "'", "do", "not", "x</w>", "\ufffd", "|"]
    rest = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bytes":
        letters, rest = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    names = letters + rest if kind.startswith("fallback") else letters
    library = Library(models.BPE({name: i for i, name in enumerate(names)}, []))
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = {
        "bytes": decoders.ByteLevel(),
        "fallback": decoders.Sequence(fallback),
        "fallback, stripped": decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)]),
        "metaspace": decoders.Metaspace(),
        "wordpiece": decoders.WordPiece(),
        "suffixes": decoders.BPEDecoder(),
        "ctc": decoders.CTC(pad_token="a"),
        "words": None,
        "odd": decoders.Sequence([decoders.Replace("x", "y"), decoders.ByteLevel()]),
    }[kind]
    library.add_special_tokens(["<s>"])
    library.add_tokens(["  ", " é x", "<tool>"])
    return library


KINDS = ("bytes", "metaspace", "wordpiece", "suffixes", "ctc", "words", "odd")
FALLBACKS = ("fallback", "fallback, stripped")


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, 265), max_size=24))
@example("bytes", [0x80 + 30] * 9)
def test_pieces_are_what_the_library_decodes_at_once(kind: str, ids: list[int]) -> None:
    library = library_of(kind)
    tokenizer = Tokenizer(library.to_str().encode())
    whole = "".join(pieces_of(tokenizer, ids))
    assert whole == tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("kind", [*KINDS, *FALLBACKS])
def test_an_id_that_is_none_has_no_text_whatever_was_asked_of_it(kind: str) -> None:
    tokenizer = Tokenizer(library_of(kind).to_str().encode())
    tokenizer.bytes_of(10_000)
    assert tokenizer.is_silent(10_000)
    assert pieces_of(tokenizer, [10_000, 2, 10_000]) == pieces_of(tokenizer, [9_999, 2, 9_999])


@settings(deadline=None)
@given(st.sampled_from(FALLBACKS), st.lists(st.integers(0, 272), max_size=24))
@example("fallback", [13 + 0xE6, 13 + 0x9D, 13 + 0xB1, 13 + 0x80, 2])
@example("fallback, stripped", [13 + 0x20, 13 + 0x20, 1])
def test_pieces_are_the_whole_where_bytes_stand_between_text(kind: str, ids: list[int]) -> None:
    library = library_of(kind)
    tokenizer = Tokenizer(library.to_str().encode())
    whole = "".join(pieces_of(tokenizer, ids))
    assert whole == tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert whole == library.decode(ids)


@settings(deadline=None)
@given(
    st.sampled_from(FALLBACKS),
    st.lists(
        st.one_of(
            st.lists(st.integers(0, 12), min_size=1, max_size=1),
            st.text(min_size=1, max_size=2).map(lambda text: [13 + b for b in text.encode()]),
        )
    ),
)
def test_characters_spelt_in_bytes_are_decoded_as_by_the_library(
    kind: str, parts: list[list[int]]
) -> None:
    library, ids = library_of(kind), [token for part in parts for token in part]
    tokenizer = Tokenizer(library.to_str().encode())
    assert "".join(pieces_of(tokenizer, ids)) == library.decode(ids)


def test_bytes_around_a_broken_character_stay_characters() -> None:
    tokenizer = Tokenizer(library_of("fallback").to_str().encode())
    ids = [13 + byte for byte in "東".encode() + b"\x80\xe6\x9d" + "é".encode()]
    assert tokenizer.decode([2, *ids, 2]) == "a東\ufffd\ufffdéa"


@pytest.mark.parametrize("kind", ["bytes", "fallback", "odd"])
def test_bytes_that_become_no_text_do_not_wait(kind: str) -> None:
    library = library_of(kind)
    tokenizer = Tokenizer(library.to_str().encode())
    bad = library.token_to_id("<0x80>" if kind == "fallback" else "Ģ")
    bad = library.token_to_id("\ufffd") if bad is None else bad
    begin = time.process_time()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(bad) for _ in range(20_000)]
    assert time.process_time() - begin < 4
    shown = [len("".join(pieces[:count])) for count in (1, 10, 100)]
    assert all(count - 3 <= length for count, length in zip((1, 10, 100), shown, strict=True))


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_at_most_three_bytes_wait(kind: str) -> None:
    library = library_of(kind)
    tokenizer = Tokenizer(library.to_str().encode())
    text = "🙂é東a"
    ids = [13 + byte for byte in text.encode()]
    if kind == "bytes":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        ids = library.encode(text).ids
    pieces = map(Detokenizer(tokenizer).push, ids)
    assert list(map(len, accumulate(pieces))) == [0, 0, 0, 1, 1, 2, 2, 2, 3, 4]


def test_special_tokens_are_no_text() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a<s>b</s>")
    assert BOS in ids
    assert tokenizer.decode(ids) == "ab"


def test_special_tokens_that_are_to_be_shown_stand_between_the_text(
    sentence_tokenizer: Tokenizer,
) -> None:
    letters = byte_tokenizer().encode("The river", special=False)
    for tokenizer, ids, special in (
        (byte_tokenizer(), letters, EOS),
        (sentence_tokenizer, [3, 5, 0, 1, 2, 5], 6),
    ):
        for place in range(1, len(ids)):
            plain, shown = Detokenizer(tokenizer), Detokenizer(tokenizer, [special])
            pieces = [shown.push(each) for each in (*ids[:place], special, *ids[place:])]
            expected = [plain.push(each) for each in ids]
            assert pieces == [*expected[:place], tokenizer.spelling(special), *expected[place:]]


def test_encoding_puts_special_tokens_around_a_text_only_when_asked() -> None:
    from tokenizers.processors import TemplateProcessing

    library = raw_byte_tokenizer()
    library.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer = Tokenizer(library.to_str().encode())
    assert tokenizer.encode("a") == [BOS, *tokenizer.encode("a", special=False)]


@pytest.mark.parametrize("text", ["\ud800", 3, None, b"bytes"])
def test_what_is_not_text_is_refused(text: Any) -> None:
    with pytest.raises(RequestError, match="is not text: expected a str that can be written"):
        byte_tokenizer().encode(text)


@pytest.mark.parametrize("definition", [b"", b"{}", b"\xff\xfe", b'{"model": 3}', b"[]"])
def test_a_file_that_is_no_tokenizer_is_refused(definition: bytes) -> None:
    with pytest.raises(
        ArtifactError, match=r"tokenizer\.json: (not a tokenizer that|not valid|found)"
    ):
        Tokenizer(definition)


def test_an_artifact_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    made = write_small_artifact(tmp_path / "a")
    files = {k: v for k, v in made.manifest.files.items() if k != "tokenizer.json"}
    made.rewrite_manifest(files=files)
    with (
        Artifact.open(made.path) as artifact,
        pytest.raises(ArtifactError, match=r"no tokenizer\.json in the manifest"),
    ):
        Tokenizer.from_artifact(artifact)


def opened(path: Path, **files: bytes) -> Tokenizer:
    with Artifact.open(write_small_artifact(path / "a", **files).path) as artifact:
        return Tokenizer.from_artifact(artifact)


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_a_template_file_makes_a_prompt(tmp_path: Path) -> None:
    source = (
        b"{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content }}\n{% endfor %}"
    )
    source += b"{% if add_generation_prompt %}[model]{% endif %}"
    config = json.dumps({"bos_token": "<s>", "chat_template": "not this one"}).encode()
    template = opened(
        tmp_path, chat_template__jinja=source, tokenizer_config__json=config
    ).chat_template
    assert template is not None
    assert template.render(MESSAGES) == "<s>[user] Hi\n[model]"
    assert template.render(MESSAGES, add_generation_prompt=False) == "<s>[user] Hi\n"


def test_a_template_in_the_configuration_makes_a_prompt(tmp_path: Path) -> None:
    config = {"chat_template": "{{ messages[0].content }}{{ eos_token }}"}
    config["eos_token"] = {"content": "</s>", "lstrip": False}
    template = opened(tmp_path, tokenizer_config__json=json.dumps(config).encode()).chat_template
    assert template is not None
    assert template.render(MESSAGES) == "Hi</s>"


def test_an_artifact_may_have_no_template(tmp_path: Path) -> None:
    assert opened(tmp_path).chat_template is None


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"a": 1, "a": 2}'])
def test_a_broken_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(
        ArtifactError, match=r"tokenizer_config\.json: (not valid JSON|found a list)"
    ):
        opened(tmp_path, tokenizer_config__json=content)
