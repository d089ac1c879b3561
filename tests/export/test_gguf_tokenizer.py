"""Tokenizers of GGUF files give the ids of those that the files were written from.

The originals are tiny ones made here, in the very form that each family's tokenizer.json has. The
same was tried with the real ones of Llama 3.1, Mistral, Qwen 3, Gemma 3 and SmolLM2.
"""

from __future__ import annotations

import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from gguf.constants import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.tokenization_utils_base import generate_merges

from edge_memllm.errors import ExportError
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_export.sources.gguf_file import GGUFFile
from edge_memllm_export.sources.gguf_tokenizer import GGUFTokenizer
from edge_memllm_export.texts import fitting_text
from support.gguf_files import metadata_of, random_model, stored_tensors, write_gguf

SPACE = "\u2581"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPELLING = PLAIN | {"use_regex": False}


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


# By tokenizer.ggml.pre: normalizer, pre-tokenizers and whether whole words are taken as tokens.
ORIGINALS: dict[str, tuple[Any, list[dict[str, Any]], bool]] = {
    "gpt-2": (None, [PLAIN | {"use_regex": True}], False),
    "smollm": (
        None,
        [{"type": "Digits", "individual_digits": True}, PLAIN | {"use_regex": True}],
        False,
    ),
    "qwen2": ({"type": "NFC"}, [split(QWEN2), SPELLING], False),
    "llama-bpe": (None, [split(LLAMA3), SPELLING], True),
    "tekken": (None, [split(TEKKEN), SPELLING], True),
}
SENTENCEPIECE = ("llama", "gemma3", "gemma4")
ADDED = ("<|im_start|>", "<|im_end|>", "<think>", "a  b")
GEMMA4 = ("<|turn>", "<turn|>", "<|tool_response>")
LETTERS = [
    *"abcdeABC 012'.,!\n\t\r",
    *(
        "é",
        "e\u0301",
        "ß",
        "漢",
        "字",
        "한",
        "😀",
        "🇩",
        "ж",
        "\u0627",
        "\u00a0",
        "\u3000",
        "½",
        "²",
    ),
    *("  ", "    ", " " * 40, "\n\n", "'s", "'LL", " the", " and", SPACE, SPACE * 2),
    *(
        "<turn|>",
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "a  b",
        "<s>",
        "<0x41>",
        "[PAD299]",
        "\U000e0001",
    ),
]
TEXTS = st.lists(st.sampled_from(LETTERS), max_size=30).map("".join) | st.text(max_size=20)


def added(first: int, contents: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "id": first + number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": content not in ("<think>", "a  b", SPACE * 2, SPACE * 3),
        }
        for number, content in enumerate(contents)
    ]


def byte_level(pre: str) -> dict[str, Any]:
    """A tokenizer.json that was trained on the prose that comes along."""
    normalizer, cuts, whole = ORIGINALS[pre]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    fields = json.loads(tokenizer.to_str())
    fields["normalizer"] = normalizer
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cuts}
    fields["decoder"] = SPELLING
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    text = fitting_text()[:20_000] + " 漢字漢字 ééé 2024 2023 DON'T don't \n\n  \n\n" * 20
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    fields = json.loads(tokenizer.to_str())
    fields["model"]["ignore_merges"] = whole
    fields["added_tokens"] = added(len(fields["model"]["vocab"]), ADDED)
    return dict(fields)


def sentencepiece(family: str) -> dict[str, Any]:
    """A tokenizer.json as those of Llama 2 or Gemma, with merges that transformers derives."""
    gemma = family != "llama"
    special = ("<pad>", "<eos>", "<bos>", "<unk>") if gemma else ("<unk>", "<s>", "</s>")
    own = (*special, *((SPACE * 2, SPACE * 3) if family == "gemma3" else ()))
    # Gemma 4 has them as tokens like others, beside ends of turns and answers of tools.
    plain = ("\n", "\n\n", "\n\n\n", SPACE, SPACE * 2) if family == "gemma4" else ()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.train_from_iterator(
        fitting_text()[:12_000].replace(" ", f" {SPACE}").split(" "), trainer
    )
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    pieces = [each for each in pieces if len(each) > 1] + [
        each for each in pieces if len(each) == 1
    ]
    tokens = [*own, *(f"<0x{byte:02X}>" for byte in range(256)), *plain, *pieces]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    ranks = {
        token: 1.0 if gemma and token in own else -float(number)
        for token, number in vocabulary.items()
    }
    prefix = [] if gemma else [{"type": "Prepend", "prepend": SPACE}]
    strip = [] if gemma else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    marks = [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    spaces = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    begin = special[2] if gemma else special[1]
    piece = {"SpecialToken": {"id": begin, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added(0, own)
        + added(len(vocabulary), {"llama": ADDED, "gemma4": GEMMA4}.get(family, ())),
        "normalizer": {"type": "Sequence", "normalizers": marks},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {begin: {"id": begin, "ids": [vocabulary[begin]], "tokens": [begin]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [*spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": generate_merges(vocabulary, ranks),
        },
    }


def metadata_for(pre: str, original: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes of a tokenizer.json."""
    pieces = pre in SENTENCEPIECE
    vocabulary = original["model"]["vocab"]
    named = {each["id"]: each for each in original["added_tokens"]}
    count = max([*vocabulary.values(), *named]) + 4  # rows of the embedding that mean nothing
    tokens = [f"[PAD{number}]" for number in range(count)]
    types = [TokenType.UNUSED] * count
    scores = np.full(count, -1000, np.float32)
    for token, number in vocabulary.items():
        byte = pieces and len(token) == 6 and token.startswith("<0x")
        tokens[number], scores[number] = token, -number
        types[number] = TokenType.BYTE if byte else TokenType.NORMAL
    for number, each in named.items():
        content, scores[number] = each["content"], -1000
        seen = not each["special"] or content == "<|tool_response>"  # by who reads what it says
        types[number] = TokenType.USER_DEFINED if seen else TokenType.CONTROL
        tokens[number] = content.replace(SPACE, " ") if pieces else content
    found = {
        "general.architecture": pre if pieces else "llama",
        "tokenizer.ggml.model": {"llama": "llama", "gemma3": "llama"}.get(
            pre, pre if pieces else "gpt2"
        ),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }
    if pre.startswith("gemma"):
        ids = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}
        found |= {f"tokenizer.ggml.{name}_token_id": each for name, each in ids.items()}
        found["tokenizer.ggml.add_space_prefix"] = False
    merges = {"tokenizer.ggml.merges": [" ".join(pair) for pair in original["model"]["merges"]]}
    if pieces:
        return found | (merges if pre == "gemma4" else {"tokenizer.ggml.scores": scores})
    return found | {
        "tokenizer.ggml.pre": pre,
        **merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }


@cache
def pair(pre: str) -> tuple[tokenizers.Tokenizer, Tokenizer, dict[str, Any]]:
    """The original, ours and the metadata between them."""
    original = sentencepiece(pre) if pre in SENTENCEPIECE else byte_level(pre)
    metadata = metadata_for(pre, original)
    files = GGUFTokenizer(metadata, "m.gguf").files()
    ours = Tokenizer.from_files(files.get, "m.gguf")
    return tokenizers.Tokenizer.from_str(json.dumps(original)), ours, metadata


@pytest.mark.parametrize("pre", [*ORIGINALS, *SENTENCEPIECE])
def test_prose_has_the_ids_of_the_original(pre: str) -> None:
    original, ours, _ = pair(pre)
    text, rng = fitting_text(), random.Random(0)
    for _ in range(100):
        start = rng.randrange(len(text))
        part = text[start : start + 300]
        expected = original.encode(part).ids
        assert expected == ours.encode(part)
        assert original.decode(expected) == ours.decode_at_once(expected)


@pytest.mark.parametrize("pre", [*ORIGINALS, *SENTENCEPIECE])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_any_text_has_the_ids_of_the_original(pre: str, text: str) -> None:
    original, ours, _ = pair(pre)
    assert original.encode(text).ids == ours.encode(text)


def test_merges_of_sentencepiece_are_in_the_order_of_transformers() -> None:
    original, ours, _ = pair("gemma3")
    expected = json.loads(original.to_str())["model"]["merges"]
    assert expected == json.loads(ours.definition)["model"]["merges"]


def test_a_tokenizer_of_no_known_pattern_cuts_as_llama_cpp_and_says_so() -> None:
    _, _, metadata = pair("gpt-2")
    for pre in ("default", None):
        changed = {**metadata, "tokenizer.ggml.pre": pre}
        changed = {key: value for key, value in changed.items() if value is not None}
        found = GGUFTokenizer(changed, "m.gguf")
        assert "does not say how its tokenizer cuts texts into words" in found.remarks[0]
        cuts = json.loads(found.files()["tokenizer.json"])["pre_tokenizer"]["pretokenizers"]
        assert [each["type"] for each in cuts] == ["Split"] * 4 + ["ByteLevel"]
    assert GGUFTokenizer(metadata, "m.gguf").remarks == ()


def files_with(pre: str, **changes: Any) -> dict[str, bytes]:
    metadata = {**pair(pre)[2], **changes}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return GGUFTokenizer(metadata, "m.gguf").files()


def ids_of(files: dict[str, bytes], text: str) -> list[int]:
    return Tokenizer.from_files(files.get, "m.gguf").encode(text)


def test_beginnings_and_ends_are_put_around_as_the_file_says() -> None:
    _, ours, _ = pair("llama-bpe")
    start, end = (ours.token(each) for each in ADDED[:2])
    plain = ours.encode("a b")
    bos = {"tokenizer.ggml.bos_token_id": start}
    around = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert [start, *plain, end] == ids_of(files_with("llama-bpe", **bos, **around), "a b")
    # Llama 3 has a beginning unless the file says otherwise, Qwen has not.
    unsaid = {"tokenizer.ggml.add_bos_token": None}
    assert [start, *plain] == ids_of(files_with("llama-bpe", **bos, **unsaid), "a b")
    assert pair("qwen2")[1].encode("a b") == ids_of(files_with("qwen2", **bos, **unsaid), "a b")
    assert ids_of(files_with("llama", **{"tokenizer.ggml.add_bos_token": False}), "a")[0] != 1


def test_gemma_4_begins_every_text_and_ends_turns_and_calls_of_tools() -> None:
    _, ours, _ = pair("gemma4")
    turn, call = ours.token("<turn|>"), ours.token("<|tool_response>")
    files = files_with("gemma4", **{"tokenizer.ggml.add_bos_token": False})
    assert ids_of(files, "a")[0] == 2
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [1, turn, call]


def test_tokens_that_llama_cpp_never_draws_are_told() -> None:
    metadata = {**pair("gemma4")[2], "tokenizer.ggml.suppress_tokens": np.array([4, 5], np.int32)}
    (remark,) = GGUFTokenizer(metadata, "m.gguf").remarks
    assert remark.startswith("tokenizer.ggml.suppress_tokens: 2 tokens")


def test_names_ends_and_recommendations_go_into_their_files() -> None:
    files = files_with(
        "smollm",
        **{
            "tokenizer.ggml.padding_token_id": 0,
            "general.sampling.temp": 0.7,
            "general.sampling.top_k": 20,
            "tokenizer.chat_template": "{{ messages }}",
        },
    )
    end = pair("smollm")[1].token("<|im_end|>")
    assert json.loads(files["generation_config.json"]) == {
        "eos_token_id": end,
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
    }
    assert files["chat_template.jinja"] == b"{{ messages }}"
    config = json.loads(files["tokenizer_config.json"])
    assert config["eos_token"] == "<|im_end|>" and config["pad_token"] == "!"
    files = files_with("llama", **{"tokenizer.ggml.eot_token_id": 5})
    generation = json.loads(files["generation_config.json"])
    # Named by the file, then those of a well-known spelling.
    assert generation["eos_token_id"][:2] == [2, 5] and len(generation["eos_token_id"]) == 3
    assert generation["bos_token_id"] == 1


def test_templates_with_names_are_kept_apart() -> None:
    files = files_with(
        "qwen2",
        **{
            "tokenizer.chat_template": "plain",
            "tokenizer.chat_template.tool_use": "tools",
            "tokenizer.chat_templates": ["tool_use"],
        },
    )
    assert "chat_template.jinja" not in files
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]


def test_a_file_gives_its_tokenizer_and_its_special_ids(tmp_path: Path) -> None:
    _, ours, metadata = pair("qwen2")
    count = len(metadata["tokenizer.ggml.tokens"])
    model = random_model("qwen2", vocab_size=count, num_hidden_layers=1)
    whole = metadata_of("qwen2", **{"qwen2.block_count": 1}) | metadata
    whole["general.architecture"] = "qwen2"
    tensors = stored_tensors("qwen2", model)
    file = GGUFFile.open(write_gguf(tmp_path / "m.gguf", "qwen2", whole, tensors))
    text = "A text, 漢字 and <|im_start|>."
    read = Tokenizer.from_files(file.text_files().get, "m.gguf")
    assert ours.encode(text) == read.encode(text)
    assert file.config["eos_token_id"] == ours.token("<|im_end|>")
    assert file.config["bos_token_id"] is None
    whole["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "one more"]
    types = metadata["tokenizer.ggml.token_type"]
    whole["tokenizer.ggml.token_type"] = np.append(types, np.int32(1))
    file = GGUFFile.open(write_gguf(tmp_path / "n.gguf", "qwen2", whole, tensors))
    with pytest.raises(ExportError, match=rf"{count + 1} tokens, the embedding {count} rows"):
        file.text_files()


@pytest.mark.parametrize(
    ("pre", "changes", "message"),
    [
        ("gpt-2", {"model": "t5"}, "is of kind 't5', expected gpt2, llama or gemma4"),
        ("llama", {"precompiled_charsmap": np.zeros(2, np.uint8)}, ", without a map of characters"),
        ("gpt-2", {"pre": "minerva"}, "cuts words by 'minerva', expected one of default, gpt-2"),
        ("gpt-2", {"pre": 7}, "cuts words by 7"),
        ("gpt-2", {"tokens": None}, "has no list of texts in tokenizer.ggml.tokens"),
        ("gpt-2", {"tokens": ["a", "a"], "token_type": np.ones(2)}, "has a token twice"),
        ("gpt-2", {"tokens": ["a" * 1025]}, "a token of so many letters: 1025, expected at most"),
        ("gpt-2", {"tokens": ["a" * 1024] * 9000}, "so many letters together: 9216000, expected"),
        ("gpt-2", {"token_type": np.ones(2)}, "and tokenizer.ggml.token_type not as many types"),
        ("gpt-2", {"token_type": None}, "and tokenizer.ggml.token_type not as many types"),
        ("gpt-2", {"merges": None}, "has no list of texts in tokenizer.ggml.merges"),
        ("gpt-2", {"merges": ["a b", "qq zz"]}, "merges 'qq' and 'zz', which are no tokens"),
        ("gpt-2", {"merges": ["ab"]}, "merges 'ab' and '', which are no tokens"),
        ("gpt-2", {"merges": [""]}, "merges '' and '', which are no tokens"),
        ("gpt-2", {"add_bos_token": True}, "wants tokenizer.ggml.bos_token_id around a text"),
        ("gpt-2", {"add_bos_token": 1}, "has 1 for tokenizer.ggml.add_bos_token, expected a truth"),
        ("gpt-2", {"eos_token_id": 10**6}, "has 1000000 for tokenizer.ggml.eos_token_id, expected"),
        ("gpt-2", {"eos_token_id": -1}, "has -1 for tokenizer.ggml.eos_token_id"),
        ("llama", {"scores": None}, "has no tokenizer.ggml.scores, one for each token"),
        ("llama", {"scores": np.zeros(3)}, "has no tokenizer.ggml.scores, one for each token"),
        ("llama", {"scores": math.nan}, "has tokenizer.ggml.scores that are no numbers"),
    ],
)
def test_a_tokenizer_that_is_none_is_refused(
    pre: str, changes: dict[str, Any], message: str
) -> None:
    if changes.get("scores") is math.nan:
        changes = {"scores": np.full(len(pair(pre)[2]["tokenizer.ggml.tokens"]), np.nan)}
    with pytest.raises(ExportError, match=r"^m\.gguf: the tokenizer ") as caught:
        files_with(pre, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()})
    assert message in str(caught.value)
