"""A tokenizer as the vocabulary file of an artifact, where its form allows and its ids are equal.

The form is the one that docs/format.md states. What is of another form, and what gives other ids
for some text that is tried, stays with the `tokenizers` library.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from edge_memllm.errors import ExportError
from edge_memllm.text import TOKENIZER_FILE
from edge_memllm.text.byte_pairs import BytePairTokenizer
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm.text.vocabulary import (
    MADE_OF,
    Columns,
    Rules,
    Vocabulary,
    columns,
    vocabulary_bytes,
)
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.texts import encyclopaedia_text

_log = logging.getLogger(__name__)

Json = Mapping[str, Any]

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
# What the library takes for a byte when it decodes, and is spelt in another way.
_LIKE_A_BYTE = re.compile(r"<0x..>", re.DOTALL)
_TRIED_TEXTS, _TRIED_TOKENS = 8, 1024
_HARD = (
    "",
    " ",
    "   \n\n\t  \r\n x",
    "a" * 200 + " " * 200 + "\n" * 200,
    "\u2581 \u2581\u2581a <0x41><0x4><unk><s></s>",
    "e\u0301\u200d \U0001f469\u200d\U0001f4bb\U0001f3fd\ufe0f \U0010ffff\x00\x7f\ufffd",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # \u00a0",
)


class _OtherFormError(Exception):
    """The tokenizer is not of the form; the text says in what."""


def vocabulary_file(source: Checkpoint) -> bytes | None:
    """Return the file for a checkpoint's tokenizer; None for none, or one of another form.

    Raises ExportError where the ids differ, which would be a fault of ours.
    """
    if source.text_file(TOKENIZER_FILE) is None:
        return None
    tokenizer = Tokenizer.from_files(source.text_file, str(source.path))
    try:
        rules, content = _parts(json.loads(tokenizer.definition))
    except _OtherFormError as other:
        _log.info("%s: no vocabulary file, which takes %s", source.path, other)
        return None
    digests = {
        name: hashlib.sha256(data).hexdigest()
        for name in MADE_OF
        if (data := source.text_file(name)) is not None
    }
    data = vocabulary_bytes(rules, content, digests)
    made = Vocabulary(data, "the vocabulary", digests)
    _compare(BytePairTokenizer(made, lambda: tokenizer.definition), tokenizer)
    return data


def _parts(fields: Json) -> tuple[Rules, Columns]:
    model = fields["model"]
    _model_fits(model)
    replaced, replacement = _normaliser(fields["normalizer"])
    _pre_tokenizer_fits(fields["pre_tokenizer"], replaced, replacement)
    shown, shown_as = _decoder(fields["decoder"])
    before, after = _around(fields["post_processor"])
    rules = Rules(replaced, replacement, shown, shown_as, before, after)
    added = fields["added_tokens"]
    spellings = _spellings(model["vocab"], added)
    return rules, columns(
        spellings,
        _merges(model),
        (each["id"] for each in added),
        (each["id"] for each in added if each["special"]),
    )


def _demand(fits: object, what: str) -> None:
    if not fits:
        raise _OtherFormError(what)


def _model_fits(model: Json) -> None:
    _demand(model["type"] == "BPE" and model["byte_fallback"], "byte pairs with bytes for the rest")
    _demand(model["vocab"].keys() >= _BYTES, "an entry for each byte")
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    _demand(not any(model.get(name) for name in odd), "merges that say all")
    like = {each for each in model["vocab"] if _LIKE_A_BYTE.fullmatch(each)}
    _demand(like == _BYTES, "bytes spelt in one way")


def _normaliser(part: Json | None) -> tuple[str, str]:
    if part is None:
        return "", ""
    while part["type"] == "Sequence" and len(part["normalizers"]) == 1:
        (part,) = part["normalizers"]
    text = part["pattern"].get("String", "") if part["type"] == "Replace" else ""
    _demand(len(text) == len(part.get("content", "")) == 1, "one letter put for another")
    return text, part["content"]


def _pre_tokenizer_fits(part: Json | None, replaced: str, replacement: str) -> None:
    """One that never finds anything to split at: the normaliser has replaced it."""
    if part is None:
        return
    split = part["type"] == "Split" and not part["invert"] and part["pattern"].get("String")
    _demand(split and split == replaced != replacement, "no words")


def _decoder(part: Json | None) -> tuple[str, str]:
    kinds = [each["type"] for each in part["decoders"]] if part and "decoders" in part else []
    _demand(kinds == ["Replace", "ByteFallback", "Fuse"], "a decoder of three parts")
    replace = part["decoders"][0]  # type: ignore[index]
    _demand(replace["pattern"].get("String"), "one text shown for another")
    return replace["pattern"]["String"], replace["content"]


def _around(part: Json | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if part is None:
        return (), ()
    _demand(part["type"] == "TemplateProcessing", "tokens put around a text")
    before: list[int] = []
    after: list[int] = []
    ids = before
    for piece in part["single"]:
        if "Sequence" in piece:
            _demand(ids is before and piece["Sequence"]["id"] == "A", "the text once")
            ids = after
        else:
            ids += part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    _demand(ids is after, "the text once")
    return tuple(before), tuple(after)


def _spellings(vocabulary: Mapping[str, int], added: list[Json]) -> list[str]:
    """Every entry by its id, those that were added to the vocabulary as well."""
    for each in added:
        plain = not any(each[name] for name in ("single_word", "lstrip", "rstrip", "normalized"))
        _demand(plain and each["content"], "added tokens that are found as they are")
    entries = {**vocabulary, **{each["content"]: each["id"] for each in added}}
    by_id = {token: spelling for spelling, token in entries.items()}
    _demand(len(by_id) == len(entries), "one entry for each id")
    _demand(sorted(by_id) == list(range(len(by_id))), "ids without a gap")
    _demand(all(vocabulary.get(each, entries[each]) == entries[each] for each in entries), "one id")
    return [by_id[token] for token in range(len(by_id))]


def _merges(model: Json) -> dict[tuple[int, int], tuple[int, int]]:
    vocabulary = model["vocab"]
    found = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        _demand(not {left, right} & _BYTES, "merges of letters")
        found[vocabulary[left], vocabulary[right]] = rank, vocabulary[left + right]
    return found


def _compare(ours: BytePairTokenizer, library: Tokenizer) -> None:
    for text in _texts(library, ours.size):
        for special in (True, False):
            expected = library.encode(text, special=special)
            same = ours.encode(text, special) == expected
            if not same or ours.decode(expected) != library.decode_at_once(expected):
                raise ExportError(
                    f"the vocabulary file and the tokenizer differ about {text!a:.80}. Please "
                    "report this with the name of the checkpoint."
                )


def _texts(library: Tokenizer, size: int) -> Iterator[str]:
    """What is hard as far as we know, prose, and entries from all over the vocabulary."""
    yield from _HARD
    yield encyclopaedia_text()
    drawn = np.random.default_rng(0).integers(0, size, (_TRIED_TEXTS, _TRIED_TOKENS))
    for ids in drawn.tolist():
        yield library.decode_at_once(ids)
        yield "".join(library.spelling(token) or "" for token in ids)
