"""How few tokens a text can have, told from its length: what cannot fit need not be tokenized.

A token stands for at most as many characters as the longest entry of the vocabulary has, as long as
nothing in the tokenizer drops or joins characters. What does so without a limit (white space that
is stripped, whole words that become one unknown token) leaves no bound, and none is claimed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

Json = Mapping[str, Any]
# From the settings of a part of a tokenizer, how many characters become one at most.
_Factor = Callable[[Json], int | None]

# Composing joins at most so many characters into one (U+1F82 and its like).
_MOST_COMPOSED = 4
# Normalizing makes at most so many of one (U+FDFA).
_MOST_DECOMPOSED = 18
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class TokenBound:
    """The bound of one tokenizer, where a token stands for at most so many characters."""

    def __init__(self, characters: int | None) -> None:
        self._characters = characters

    @classmethod
    def of(cls, definition: str) -> TokenBound:
        """Find the bound from the text of a `tokenizer.json`."""
        return cls(_characters_per_token(json.loads(definition)))

    @property
    def characters(self) -> int | None:
        """How many characters of a text one token stands for at most; None where none is known."""
        return self._characters

    def fewest(self, length: int) -> int:
        """Return a number of tokens that no text of so many characters falls short of."""
        return 0 if self._characters is None else -(-length // self._characters)


def _characters_per_token(definition: Json) -> int | None:
    normalized = _joined(definition.get("normalizer"), _NORMALIZERS, "normalizers")
    kept = _joined(definition.get("pre_tokenizer"), _PRE_TOKENIZERS, "pretokenizers")
    entries = _entries(definition)
    if normalized is None or kept is None or entries is None or not _adds_only(definition):
        return None
    added = definition.get("added_tokens") or ()
    if any(each["lstrip"] or each["rstrip"] for each in added):  # takes the white space beside it
        return None
    changed = definition.get("normalizer") is not None
    long = (
        len(each["content"]) * (_MOST_DECOMPOSED if changed and each["normalized"] else 1)
        for each in added
    )
    return normalized * max(chain(map(len, entries), long), default=1) or None


def _joined(part: Json | None, known: Mapping[str, _Factor], inner: str) -> int | None:
    """Return how many characters become one at most; None for no limit that is known."""
    if part is None:
        return 1
    if part["type"] == "Sequence":
        product = 1
        for each in part[inner]:
            factor = _joined(each, known, inner)
            if factor is None:
                return None
            product *= factor
        return product
    find = known.get(part["type"])
    return None if find is None else find(part)


def _times(factor: int, _: Json) -> int:
    return factor


def _replaced(part: Json) -> int | None:
    """Texts that are replaced, not what a regular expression finds: that may be of any length."""
    pattern, content = part["pattern"].get("String"), part["content"]
    if not pattern or not content:
        return None
    return -(-len(pattern) // len(content))


def _split(part: Json) -> int | None:
    return None if part["behavior"] == "Removed" else 1


_SAME = partial(_times, 1)
_NORMALIZERS: Mapping[str, _Factor] = {
    "ByteLevel": _SAME,
    "Lowercase": _SAME,
    "NFC": partial(_times, _MOST_COMPOSED),
    "NFD": _SAME,
    "NFKC": partial(_times, _MOST_COMPOSED),
    "NFKD": _SAME,
    "Prepend": _SAME,
    "Replace": _replaced,
}
_PRE_TOKENIZERS: Mapping[str, _Factor] = {
    "ByteLevel": _SAME,
    "Digits": _SAME,
    "FixedLength": _SAME,
    "Metaspace": _SAME,
    "Punctuation": _split,
    "Split": _split,
    "UnicodeScripts": _SAME,
}


def _entries(definition: Json) -> Mapping[str, int] | None:
    """Return the vocabulary of a model that leaves out no character and joins no unknown ones."""
    model = definition["model"]
    if model.get("type") != "BPE":
        return None
    vocabulary: Mapping[str, int] = model["vocab"]
    if model.get("byte_fallback") and all(each in vocabulary for each in _BYTES):
        complete = True  # no character is unknown
    elif model.get("unk_token") is not None:
        complete = not model.get("fuse_unk")
    elif model.get("byte_fallback"):
        complete = False
    else:
        complete = _bytes_become_letters(definition) and all(
            letter in vocabulary for letter in _letters()
        )
    return vocabulary if complete else None


def _bytes_become_letters(definition: Json) -> bool:
    """Whether the tokenizer writes each byte as a letter of its own, as GPT-2's does."""
    return any(
        each["type"] == "ByteLevel"
        for name, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
        for part in [definition.get(name)]
        if part is not None
        for each in part.get(inner, [part])
    )


def _letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def _adds_only(definition: Json) -> bool:
    """Whether what goes around a text leaves the text in."""
    part = definition.get("post_processor")
    parts = [] if part is None else part.get("processors", [part])
    return all(
        any(piece.get("Sequence", {}).get("id") == "A" for piece in each["single"])
        for each in parts
        if each["type"] == "TemplateProcessing"
    )
