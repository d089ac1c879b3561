"""Names for clusters of tokens: what sets those of one apart from the vocabulary."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Mask
from edge_memllm.interpretation.findings import Token
from edge_memllm.interpretation.tokens import Labelling
from edge_memllm.text.token_texts import TokenTexts

_MOST_WORDS = 3  # properties in a label
_LIKE = 3  # typical tokens
_LEAST_SHARE = 0.25  # of a cluster, for a property to be named
_LEAST_LIFT = 1.5  # times its share of the vocabulary
_LEAST_INFORMATION = 0.05  # nats per token of the cluster, for a property to be named
_TELLING = 1.0  # the same, for it to say enough
_SAME = 0.8  # of the tokens of two properties: one says it all
_ENDING_LETTERS = (1, 2, 3, 4)
_RARE = 0.002  # of the vocabulary: endings and scripts that fewer tokens have are left out


class Labeller:
    """Names clusters of one vocabulary."""

    def __init__(self, texts: TokenTexts, labellings: Iterable[Labelling]) -> None:
        """Look at every token once; `labellings` are properties as well."""
        words = [texts.text(token) for token in range(len(texts))]
        self._properties = [
            *_of_labellings(labellings),
            *_of_groups(_endings(words), len(words)),
            *_of_groups(_scripts(words), len(words)),
            Property("leading space", np.array([word[:1].isspace() for word in words])),
            Property("no leading space", np.array([not word[:1].isspace() for word in words])),
        ]
        self._shares = np.array([each.mask.mean() for each in self._properties])

    def label(self, members: Mask, typical: Sequence[Token]) -> str:
        """Return what sets the tokens of `members` [V] apart, with their share in per cent.

        Where that says little, the first of the `typical` tokens are named before it.
        """
        shares = np.array([each.mask[members].mean() for each in self._properties])
        information = _information(shares, self._shares)
        information[(shares < _LEAST_SHARE) | (shares < _LEAST_LIFT * self._shares)] = 0
        chosen: list[int] = []
        for place in np.argsort(-information, kind="stable").tolist():
            if information[place] < _LEAST_INFORMATION or len(chosen) == _MOST_WORDS:
                break
            if not any(self._overlap(members, place, other) > _SAME for other in chosen):
                chosen.append(place)
        named = ", ".join(
            f"{self._properties[place].words} {shares[place]:.0%}" for place in chosen
        )
        if named and information[chosen[0]] >= _TELLING:
            return named
        like = f"like {', '.join(_shown(each) for each in typical[:_LIKE])}"
        return f"{like}; {named}" if named else like

    def _overlap(self, members: Mask, first: int, second: int) -> float:
        """How much of what either property has in a cluster both have."""
        one, other = (self._properties[place].mask[members] for place in (first, second))
        return float((one & other).sum() / max(1, (one | other).sum()))


@dataclass(frozen=True, slots=True)
class Property:
    """Something that tokens have or have not, [V]."""

    words: str
    mask: Mask


def _shown(token: Token) -> str:
    """A token's text without its spaces; what would not be seen is written out."""
    text = token.text.strip()
    return text if text and text.isprintable() else repr(token.text)[1:-1]


def _information(share: NDArray[np.float64], usual: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of a property's share in a cluster from that elsewhere, nats."""
    share, usual = (np.clip(each, 1e-9, 1 - 1e-9) for each in (share, usual))
    having = share * np.log(share / usual)
    return np.asarray(having + (1 - share) * np.log((1 - share) / (1 - usual)))


def _of_labellings(labellings: Iterable[Labelling]) -> list[Property]:
    return [
        Property(name, each.classes == number)
        for each in labellings
        for number, name in enumerate(each.names)
    ]


def _of_groups(groups: Mapping[str, list[int]], vocabulary: int) -> list[Property]:
    """Properties of groups of tokens that are large enough, that of the most words first.

    Of endings that say the same, the longest is named.
    """
    found = []
    for words, tokens in sorted(groups.items(), key=lambda each: (-len(each[0]), each[0])):
        if len(tokens) >= max(3, _RARE * vocabulary):
            mask = np.zeros(vocabulary, np.bool_)
            mask[tokens] = True
            found.append(Property(words, mask))
    return found


def _endings(words: list[str]) -> dict[str, list[int]]:
    """Tokens by the last letters that lower-case ones end in; not those that are all of it."""
    found: dict[str, list[int]] = {}
    for token, word in enumerate(words):
        letters = word.strip()
        if letters.isalpha() and letters.islower():
            for count in _ENDING_LETTERS:
                if count < len(letters):
                    found.setdefault(f"ends in -{letters[-count:]}", []).append(token)
    return found


def _scripts(words: list[str]) -> dict[str, list[int]]:
    """Tokens by the script of most of their letters; Latin, which is the usual, is no script."""
    found: dict[str, list[int]] = {}
    for token, word in enumerate(words):
        names = Counter(
            unicodedata.name(letter, "?").split()[0] for letter in word if letter.isalpha()
        )
        script = names.most_common(1)[0][0] if names else "LATIN"
        if script != "LATIN":
            found.setdefault(f"{script.capitalize()} script", []).append(token)
        elif not word.isascii() and names:
            found.setdefault("accented letters", []).append(token)
    return found
