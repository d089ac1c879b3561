"""The text of tokens made safe to look at: nothing invisible, nothing that reorders a line.

A vocabulary holds anything: control characters, half a script, marks without their letter.
"""

from __future__ import annotations

import unicodedata

from edge_memllm.interpretation.findings import Scored, Token
from edge_memllm.interpretation.report.markup import Markup, element, figure, scaled

_SPACE, _LINE, _TAB = "␣", "⏎", "⇥"
_NOTHING = "∅"
_CARRIER = "◌"  # what a mark without its letter is put on
# Controls, formats and bidirectional overrides, surrogates, private and unassigned; odd spaces.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})


def visible(text: str) -> str:
    """Return a token's text with signs for spaces and for all that would not be seen."""
    shown = "".join(_SPACE if each == " " else _sign(each) for each in text)
    return _on_carrier(shown) or _NOTHING


def running(text: str) -> str:
    """Return text as it runs in a sentence: spaces and line ends stay, the rest is made visible."""
    shown = "".join({" ": " ", "\n": f"{_LINE}\n"}.get(each) or _sign(each) for each in text)
    return _on_carrier(shown)


def name_of(token: Token) -> Markup:
    """Return a token in the middle of words."""
    return element("bdi", visible(token.text), class_="token", title=f"token {token.id}")


def chips(scored: tuple[Scored, ...], kind: str) -> Markup:
    """Return tokens with their figures, coloured by their size; `kind` says what they are."""
    limit = max((abs(each.value) for each in scored), default=0.0)
    items = (
        element(
            "li",
            element("bdi", visible(each.token.text)),
            element("small", figure(each.value)),
            style=scaled(each.value, limit),
            title=f"token {each.token.id}",
        )
        for each in scored
    )
    inside = element("ul", *items) if scored else element("span", "none", class_="soft")
    return element("div", element("span", kind, class_="kind"), inside, class_="chips")


def _sign(letter: str) -> str:
    """Return a letter, or what stands for one that would not be seen."""
    code = ord(letter)
    if letter == "\n":
        return _LINE
    if letter == "\t":
        return _TAB
    if letter != " " and unicodedata.category(letter) in _HIDDEN:
        return f"⟨{code:02X}⟩"
    return letter


def _on_carrier(text: str) -> str:
    first_is_mark = bool(text) and unicodedata.category(text[0]).startswith("M")
    return _CARRIER + text if first_is_mark else text
