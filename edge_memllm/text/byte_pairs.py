"""Byte pairs merged by a vocabulary file, to the ids that the `tokenizers` library gives.

For tokenizers of the form that Gemma has: added tokens are cut out first, one letter is put for
another (U+2581 for the space), and all between is merged as one word by ascending rank, letters
that the vocabulary lacks as their UTF-8 bytes. Such a word is as long as the text, so it is cut
where no entry that merging makes has both letters: nothing merges across. What is cut out is short,
comes again, and is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

from edge_memllm.errors import ArtifactError
from edge_memllm.text.token_bound import TokenBound
from edge_memllm.text.vocabulary import Vocabulary, letter_pairs

_BLOCK = 1 << 16  # letters that are cut at a time
_BRIEF = 48  # letters of a part that is kept: words and the spaces between them
_KEPT_PARTS = 1 << 13
_KEPT_PAIRS = 1 << 12
_KEPT_LETTERS = 1 << 11
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NONE = (1 << 62, 0, 0)  # an added token behind every text
_BEYOND = np.uint64((1 << 64) - 1)  # above every pair of letters
_MERGED = -1  # in the place of an entry that was merged into the one before it


class BytePairTokenizer:
    """Encodes and decodes; several threads may share it."""

    reader = "vocabulary file"
    decoders = ("Replace", "ByteFallback", "Fuse")

    def __init__(self, vocabulary: Vocabulary, definition: Callable[[], str]) -> None:
        """Take a vocabulary, and what gives the text of its tokenizer.json, for who wants that.

        Raises `ArtifactError` for a vocabulary without an entry for each byte.
        """
        self._vocabulary = vocabulary
        self._definition = definition
        self._rules = vocabulary.rules
        self.special = frozenset(vocabulary.columns.special.tolist())
        self._added = _Added(vocabulary)
        self._bytes = _byte_ids(vocabulary)
        self._joined = np.append(vocabulary.columns.joined, _BEYOND)
        self._merge = lru_cache(_KEPT_PAIRS)(vocabulary.merge)
        self._letter = lru_cache(_KEPT_LETTERS)(self._letter_ids)
        self._kept = lru_cache(_KEPT_PARTS)(self._merged)
        self.spelling = vocabulary.spelling
        self.token = vocabulary.token

    @property
    def size(self) -> int:
        """How many entries there are."""
        return len(self._vocabulary)

    @property
    def definition(self) -> str:
        """The text of a `tokenizer.json` that makes the same tokenizer: opens the library."""
        return self._definition()

    @property
    def bound(self) -> TokenBound:
        """How few tokens a text can have: no letter is dropped, none becomes several."""
        return TokenBound(self._vocabulary.longest)

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text; `special` puts what belongs around it."""
        ids = list(self._rules.before) if special else []
        added = self._added.found(text)
        start, end, token = next(added, _NONE)
        if self._rules.replaced:
            text = text.replace(self._rules.replaced, self._rules.replacement)
        begin = 0
        for cut in self._cuts(text):
            while start < cut:
                ids += self._part(text[begin:start])
                ids.append(token)
                begin = end
                start, end, token = next(added, _NONE)
            if begin < cut:
                ids += self._part(text[begin:cut])
                begin = cut
        return ids + list(self._rules.after) if special else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids: without those that are special or none.

        Bytes in a row that are not all characters become U+FFFD, one for each.
        """
        text: list[str] = []
        waiting = bytearray()
        for token in ids:
            spelling = None if token in self.special else self.spelling(token)
            if spelling is None:
                continue
            if (byte := _BYTE.fullmatch(spelling)) is not None:
                waiting.append(int(byte[1], 16))
                continue
            text.append(_decoded(waiting))
            waiting.clear()
            text.append(spelling.replace(self._rules.shown, self._rules.shown_as))
        text.append(_decoded(waiting))
        return "".join(text)

    def _cuts(self, text: str) -> Iterator[int]:
        """Yield where no merging can join what is left and right, the end of the text last."""
        for block in range(0, len(text), _BLOCK):
            codes = np.frombuffer(text[block : block + _BLOCK + 1].encode("utf-32-le"), "<u4")
            pairs = letter_pairs(codes)
            places = np.searchsorted(self._joined, pairs)
            yield from (np.flatnonzero(self._joined[places] != pairs) + (block + 1)).tolist()
        yield len(text)

    def _part(self, text: str) -> Sequence[int]:
        return self._kept(text) if len(text) <= _BRIEF else self._merged(text)

    def _merged(self, text: str) -> Sequence[int]:
        """Merge by ascending rank, of equal ones the leftmost first.

        A merge that was found and whose entries have changed since still takes place if they now
        become the same: so the library does it (`Word::merge_all`), and its ranks depend on that.
        """
        ids = [token for letter in text for token in self._letter(letter)]
        count = len(ids)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        waiting = []
        for at, (left, right) in enumerate(pairwise(ids)):
            if (found := self._merge(left, right)) is not None:
                waiting.append((found[0], at, found[1]))
        heapify(waiting)
        while waiting:
            _, at, made = heappop(waiting)
            other = after[at]
            if ids[at] == _MERGED or other == count:
                continue
            found = self._merge(ids[at], ids[other])
            if found is None or found[1] != made:
                continue
            ids[at], ids[other] = made, _MERGED
            after[at] = following = after[other]
            if following < count:
                before[following] = at
                if (found := self._merge(made, ids[following])) is not None:
                    heappush(waiting, (found[0], at, found[1]))
            if (earlier := before[at]) >= 0 and (found := self._merge(ids[earlier], made)):
                heappush(waiting, (found[0], earlier, found[1]))
        return tuple(token for token in ids if token != _MERGED)

    def _letter_ids(self, letter: str) -> tuple[int, ...]:
        token = self._vocabulary.letter(letter)
        return (
            (token,) if token is not None else tuple(map(self._bytes.__getitem__, letter.encode()))
        )


def _byte_ids(vocabulary: Vocabulary) -> list[int]:
    ids = [vocabulary.token(f"<0x{byte:02X}>") for byte in range(256)]
    found = [token for token in ids if token is not None]
    if len(found) < len(ids):
        raise ArtifactError(
            f"{vocabulary.where}: {len(ids) - len(found)} bytes have no entry, expected one for "
            "each. Export the model again."
        )
    return found


def _decoded(data: bytearray) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(data)


class _Added:
    """Finds added tokens in a text: the leftmost, of those the longest."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids: dict[str, int | None] = {}  # of every beginning of one, None where it is none
        for token in vocabulary.columns.added.tolist():
            spelling = vocabulary.spelling(token) or ""
            for length in range(1, len(spelling)):
                self._ids.setdefault(spelling[:length], None)
            self._ids[spelling] = token
        firsts = "".join(re.escape(each) for each in self._ids if len(each) == 1)
        self._first = re.compile(f"[{firsts}]" if firsts else r"(?!)")

    def found(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield start, end and id of each."""
        place = 0
        while (match := self._first.search(text, place)) is not None:
            start = match.start()
            place, known = start + 1, None
            for end in range(start + 1, len(text) + 1):
                beginning = text[start:end]
                if beginning not in self._ids:
                    break
                if (token := self._ids[beginning]) is not None:
                    place, known = end, token
            if known is not None:
                yield start, place, known
