"""Windows of text: documents kept apart, each window behind the token that begins a text.

Windows never cross documents, and no document is on both sides, so figures can be given an error
that counts documents, not tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

_TITLE = re.compile(r"^= .+ =$", re.MULTILINE)
_HELD_OUT = 4  # of so many documents one
_CHARACTERS = 12  # of a token, at most, in what is cut out for a window


@dataclass(frozen=True)
class Windows:
    """Windows ``ids`` [W, T] and the number of the document each is of, ``document`` [W]."""

    ids: torch.Tensor
    document: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        """How many documents they are of."""
        return len(self.document.unique())

    def first(self, count: int) -> Windows:
        """So many of them, spread evenly."""
        chosen = torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()
        return Windows(self.ids[chosen], self.document[chosen])


def read_documents(path: Path, length: int, count: int | None = None) -> list[str]:
    """The texts behind title lines ``= title =``, at most ``count`` of them, spread evenly.

    Those that have no piece for a window of ``length`` tokens are left out.
    """
    parts = [part.strip() for part in _TITLE.split(path.read_text("utf-8"))]
    found = [part for part in parts if len(part) >= _CHARACTERS * length]
    if count is None or count >= len(found):
        return found
    return [found[at * len(found) // count] for at in range(count)]


def two_sides(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is learned from and what is held out: whole documents, one of four held out."""
    learned = [text for n, text in enumerate(documents) if n % _HELD_OUT != _HELD_OUT - 1]
    held_out = [text for n, text in enumerate(documents) if n % _HELD_OUT == _HELD_OUT - 1]
    return learned, held_out


def cut_windows(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    boundary: int,
    length: int,
    count: int,
    offset: float = 0.0,
) -> Windows:
    """About ``count`` windows of ``length`` tokens, as many of each document, spread over it.

    ``offset``, below 1, moves all of them by that part of their distance. A document that is too
    short for its share gives fewer.
    """
    ids, numbers = [], []
    size = _CHARACTERS * length
    for number, text in enumerate(documents):
        share = (number + 1) * count // len(documents) - number * count // len(documents)
        room = len(text) // size
        share = min(share, room)
        for place in range(share):
            start = int((place + offset) * (len(text) - size) / max(1, share))
            start = text.find(" ", start)  # whole words
            found = tokenizer.encode(text[start : start + size], add_special_tokens=False).ids
            if start >= 0 and len(found) >= length - 1:
                ids.append([boundary, *found[: length - 1]])
                numbers.append(number)
    return Windows(torch.tensor(ids), torch.tensor(numbers))
