"""A hostile tokenizer.json neither hangs nor swells; what real ones hold is let through."""

from __future__ import annotations

# ruff: noqa: E501, RUF001 - patterns as they were published
import base64
import json
import time
from contextlib import suppress
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from edge_memllm.errors import ArtifactError
from edge_memllm.text.patterns import PatternError, check_pattern
from edge_memllm.text.tokenization import Detokenizer, Tokenizer

LETTERS = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz .")}
TEXT = "the old mill turns near the bank while a child sleeps. " * 400

ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "llama3": rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
    "qwen2": rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
    "qwen3.5": rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{REST}",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"{ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{REST}",
    "numbers": r"\p{N}{1,3}",
    "han": "[一-龥\u3040-ゟ゠-ヿ]+",
    "kimi": r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]+{ENDINGS}?|\p{{N}}{{1,3}}|{REST}",
    "clip": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "falcon": "[0-9][0-9][0-9]",
    "spaces": " {2,}",
    "end": r"\s+$",
    "lines": "[\r\n]",
    "widths": r"\s{512}(?!\S)|\s{8}(?!\S)|\s+",
    "thousands": r"(?=(\d{3})+(?!\d))",
    "all": r"(?:\s+|\S+)",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_patterns_are_let_through(name: str) -> None:
    library = Library(models.BPE(LETTERS, []))
    pattern = json.loads(library.to_str()) | {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": PUBLISHED[name]},
            "behavior": "Isolated",
            "invert": False,
        }
    }
    begin = time.process_time()
    assert Tokenizer(json.dumps(pattern).encode()).encode(TEXT)
    for run in ("   ", "a", "A", "1", "\n", "…", "Ä"):
        check_pattern(PUBLISHED[name])
        Tokenizer(json.dumps(pattern).encode()).encode(run * 3000)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a+)+b", "repeats a group"),
        (r"(\w+\s?)+$", "repeats a group"),
        (r"(?:a|a|aa)*b", "repeats a group"),
        (r"(?:[a-z ]{1,3})+X", "repeats a group"),
        (r"(a{1,99}){1,99}X", "repeats a group"),
        (r"[a-z ]{1,3}+X", "wants 'X' behind"),
        (r"[\s\S]*X", "wants 'X' behind"),
        (r"\w*\w*X", "wants 'X' behind"),
        (r"\w+(?!X)", "wants .* behind"),
        (r"\w+$", "wants .* behind"),
        (r"(?:\w+|a)X", "wants 'X' behind"),
        (r"(?=.*)a", "looks ahead or back without a bound"),
        (r"a?" * 60 + "a" * 60, "in too many ways"),
        (r"((a{99999}){99999}){99999}", "in too many ways"),
        ("|".join(["a?b?c?d?"] * 900), "in too many ways"),
        (r"(.)\1", "which is not known here"),
        (r"(?<x>a)", "which is not known here"),
        (r"(?>a*)", "which is not known here"),
        (r"a**", "which is not known here"),
        (r"\K", "which is not known here"),
        (r"[a", "class of characters that nothing closes"),
        (r"[]a]", "begins with a ']'"),
        (r"(a", "bracket that nothing closes"),
        (r"a)", "that nothing opens"),
        ("(?:" * 40 + ")" * 40, "nested too deeply"),
        ("a" * 9000, "has 9000 characters"),
    ],
)
def test_patterns_that_may_take_for_ever_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        if "ways" in message and "|" in pattern:
            check_pattern(f"(?:{pattern})X")
        check_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "least"), [("a", 1), (" {2,}", 2), ("ab?|cde", 1), ("x*", 0), (r"(?=a)b", 1)]
)
def test_what_a_pattern_matches_at_least(pattern: str, least: int) -> None:
    assert check_pattern(pattern) == least


def sequence(section: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", section: list(parts)}


def replacing(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def charsmap(tree: int, *texts: bytes) -> dict[str, Any]:
    data = tree.to_bytes(4, "little") + bytes(min(tree, 64)) + b"\0".join(texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def added(content: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 28 + number, "content": content, **flags}


def around(*pieces: dict[str, Any], ids: int = 1) -> dict[str, Any]:
    pair = [{"Sequence": {"id": letter, "type_id": 0}} for letter in "AB"]
    token = {"id": "a", "ids": [0] * ids, "tokens": ["a"] * ids}
    return {
        "type": "TemplateProcessing",
        "single": list(pieces),
        "pair": pair,
        "special_tokens": {"a": token},
    }


A_TEXT = {"Sequence": {"id": "A", "type_id": 0}}
A_TOKEN = {"SpecialToken": {"id": "a", "type_id": 0}}
NORMALIZERS, PRE, PROCESSORS, DECODERS = "normalizers", "pretokenizers", "processors", "decoders"
HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("pattern", {"normalizer": replacing("", Regex="(a+)+b")}, "normalizer: the pattern"),
    ("decoder's pattern", {"decoder": replacing("", Regex="(a+)+b")}, "decoder: the pattern"),
    ("long content", {"normalizer": replacing("b" * 99)}, "99 times as long, expected at most 16"),
    ("doubling", {"normalizer": sequence(NORMALIZERS, *[replacing("aa")] * 9)}, "512 times"),
    ("nothing", {"normalizer": replacing("b" * 20, String="")}, "21 times as long"),
    ("nothing found", {"normalizer": replacing("b" * 20, Regex="x*")}, "21 times as long"),
    ("prepending", {"normalizer": {"type": "Prepend", "prepend": "b" * 99}}, "prepends more than"),
    ("bytes", {"pre_tokenizer": sequence(PRE, *[{"type": "ByteLevel"}] * 9)}, "512 times"),
    (
        "both",
        {
            "normalizer": replacing("b" * 9),
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True},
        },
        "pre_tokenizer: a text may become 18 times",
    ),
    ("decoder", {"decoder": sequence(DECODERS, *[replacing("aa")] * 9)}, "decoder: a text may"),
    ("many", {"normalizer": sequence(NORMALIZERS, *[{"type": "NFC"}] * 99)}, "has 99 entries"),
    (
        "many in several",
        {"normalizer": sequence(NORMALIZERS, *[sequence(NORMALIZERS, *[{"type": "NFC"}] * 9)] * 9)},
        "81 parts, expected at most 64",
    ),
    ("unknown", {"decoder": {"type": "Python"}}, "a part of type 'Python', expected one of"),
    ("no part", {"decoder": [1]}, "decoder holds a list, expected an object"),
    ("no list", {"decoder": {"type": "Sequence", "decoders": 5}}, "is a int, expected a list"),
    ("map", {"normalizer": charsmap(64, b"x" * 99)}, "mapped to 99 bytes, expected at most 64"),
    ("map's tree", {"normalizer": charsmap(1 << 30)}, "1073741824 of them are a tree"),
    (
        "map's text",
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}},
        "is not Base64",
    ),
    ("text twice", {"post_processor": around(A_TEXT, A_TEXT)}, "a text 2 times, expected once"),
    ("no text", {"post_processor": around(A_TOKEN)}, "a text 0 times, expected once"),
    ("many around", {"post_processor": around(A_TEXT, *[A_TOKEN] * 99)}, "has 100 entries"),
    ("one of many", {"post_processor": around(A_TEXT, A_TOKEN, ids=99)}, "has 99 entries"),
    (
        "words",
        {
            "model": {
                "type": "WordPiece",
                "unk_token": "a",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 10**9,
                "vocab": {"a": 0},
            }
        },
        "takes words of 1000000000 characters",
    ),
    (
        "mark",
        {
            "model": {
                "type": "BPE",
                "continuing_subword_prefix": "#" * 99,
                "vocab": LETTERS,
                "merges": [],
            }
        },
        "model's continuing_subword_prefix has more than 16 characters",
    ),
    *(
        (
            f"merge {number}",
            {
                "model": {
                    "type": "BPE",
                    "continuing_subword_prefix": "##",
                    "vocab": {"a": 0, "b": 1, "##b": 2, "ab": 3},
                    "merges": [["a", "##b"], merge],
                }
            },
            r"model's merges have '.*', which does not start with the .*_prefix '##'",
        )
        for number, merge in enumerate((["a", "b"], "a b", ["a", ""], ["a", "#é"]))
    ),
    ("no model", {"model": None}, "not a tokenizer that tokenizers"),
    ("odd model", {"model": {"type": "Magic"}}, "model is of type 'Magic', expected one of BPE"),
    ("long", {"added_tokens": [added("x" * 5000, 0)]}, "added_tokens has a token of 5000 char"),
    (
        "added",
        {"added_tokens": [added(f"{number:01000}", number) for number in range(4200)]},
        "4200000 characters, expected at most 4194304",
    ),
    (
        "unknown",
        {"model": {"type": "BPE", "unk_token": "x" * 5000, "vocab": LETTERS, "merges": []}},
        "vocab has a token of 5000 characters, expected at most 1024",
    ),
]


def definition(**changes: Any) -> bytes:
    fields = json.loads(Library(models.BPE(LETTERS, [])).to_str())
    return json.dumps({**fields, **changes}).encode()


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in HOSTILE])
def test_a_tokenizer_that_might_swell_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=rf"^tokenizer\.json: .*{message}"):
        Tokenizer(definition(**changes))


def test_numbers_beyond_those_of_real_tokenizers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, most in (("TOKENS", 27), ("MERGES", 1), ("ADDED", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(f"edge_memllm.text.tokenizer_file.MOST_{name}", most)
            merges = models.BPE({**LETTERS, "ab": 28, "cd": 29}, [("a", "b"), ("c", "d")])
            library = Library(merges)
            library.add_tokens(["one", "two"])
            with pytest.raises(ArtifactError, match=rf"entries, expected at most {most}\. No"):
                Tokenizer(library.to_str().encode())


def test_deep_or_ambiguous_json_is_refused() -> None:
    text = definition().decode()
    deep = '{"type":"Sequence","normalizers":[' * 20 + "null" + "]}" * 20
    with pytest.raises(ArtifactError, match="nested too deeply, expected at most 8 times"):
        Tokenizer(text.replace('"normalizer": null', f'"normalizer": {deep}').encode())
    with pytest.raises(ArtifactError, match="the JSON is nested too deeply"):
        Tokenizer(b"[" * 100_000)
    again = text.replace('"normalizer": null', '"normalizer": null, "normalizer": null')
    with pytest.raises(ArtifactError, match="key 'normalizer' appears twice"):
        Tokenizer(again.encode())


def real_ones() -> dict[str, Library]:
    """Tokenizers of the forms that are about, small."""
    sentence = Library(
        models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("▁the", -1.5)], 0)
    )
    sentence.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(" {2,}", " ")]
    )
    sentence.pre_tokenizer = pre_tokenizers.Metaspace()
    sentence.decoder = decoders.Metaspace()
    pieces = ["<unk>", "▁", "t", "h", "e", "▁t"] + [f"<0x{byte:02X}>" for byte in range(256)]
    spm = Library(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [("▁", "t")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    spm.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spm.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    spm.post_processor = processors.TemplateProcessing(
        single="<unk> $A", pair="<unk> $A <unk>:1 $B:1", special_tokens=[("<unk>", 0)]
    )
    words = Library(models.WordPiece({"[UNK]": 0, "the": 1, "##a": 2, "a": 3}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.post_processor = processors.BertProcessing(("a", 3), ("the", 1))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = Library(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    level.normalizer = normalizers.NFC()
    level.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    level.decoder = decoders.ByteLevel()
    level.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False)])
    return {"unigram": sentence, "spm": spm, "wordpiece": words, "bytes": level}


@pytest.mark.parametrize("name", ["unigram", "spm", "wordpiece", "bytes"])
def test_tokenizers_of_the_usual_forms_are_let_through(name: str) -> None:
    library = real_ones()[name]
    tokenizer = Tokenizer(library.to_str().encode())
    ids = tokenizer.encode("the 12 théâtres,  a")
    assert ids == library.encode("the 12 théâtres,  a").ids
    pieces = Detokenizer(tokenizer)
    assert "".join(map(pieces.push, ids)) + pieces.flush() == tokenizer.decode(ids)


def test_an_old_file_need_not_say_of_what_type_its_model_is() -> None:
    for name, library in real_ones().items():
        fields = json.loads(library.to_str())
        del fields["model"]["type"]
        if name != "unigram":
            Tokenizer(json.dumps(fields).encode())


ODD: list[Any] = [None, True, -1, 1.5, "x", [], {}, [1], {"a": 1}, [["Sequence"]], {"type": ["x"]}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values, but for those of a vocabulary."""
    found = [path] if path else []
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys if path[-1:] not in (("vocab",), ("merges",)) else ():
        found += places(value[key], (*path, key))
    return found


@pytest.mark.parametrize("name", ["unigram", "spm", "wordpiece", "bytes", "template"])
def test_any_value_anywhere_is_taken_or_refused_in_words(name: str) -> None:
    library = real_ones()[name if name != "template" else "bytes"]
    if name == "template":
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    definition = library.to_str()
    for path in places(json.loads(definition)):
        for odd in ODD:
            fields = json.loads(definition)
            holder = fields
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = odd
            with suppress(ArtifactError):
                Tokenizer(json.dumps(fields).encode()).encode("the mill")
