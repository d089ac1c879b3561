"""HTML that is escaped by the way it is made, and the few elements that all sections share."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

from edge_memllm.interpretation.findings import Scored, Token

MINUS = "\N{MINUS SIGN}"
_DASH = "\N{EN DASH}"
_VOID = frozenset({"link", "meta"})  # elements without an end
_FEW, _MANY = 1e-3, 1e5  # sizes beyond which a figure is written with an exponent

_SPACE, _LINE, _TAB = "␣", "⏎", "⇥"
_NOTHING = "∅"
_CARRIER = "◌"  # what a mark without its letter is put on
# Controls, formats and bidirectional overrides, surrogates, private and unassigned; odd spaces.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})


class Markup(str):
    """Text that is HTML already: put into an element as it is."""

    __slots__ = ()


def element(name: str, /, *inside: str, **attributes: str | bool | None) -> Markup:
    """Return an element; what is inside is escaped unless it is `Markup`.

    Attributes are written `class_`, `data_name`, `aria_label`; True stands alone, None and False
    are left out.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{together(*inside)}</{name}>")


def together(*parts: str, between: str = "") -> Markup:
    """Return parts one after another, each escaped unless it is `Markup`."""
    kept = (each if isinstance(each, Markup) else escape(each) for each in parts)
    return Markup(escape(between).join(kept))


def figure(value: float, *, signed: bool = False) -> str:
    """Write a number for people, to three digits or thousandths; what is no number is a dash."""
    if not math.isfinite(value):
        return _DASH
    size = abs(value)
    if size and not _FEW <= size < _MANY:
        words = _powers(size)
    else:
        digits = 2 - math.floor(math.log10(size)) if size else 0
        words = f"{size:,.{min(3, max(0, digits))}f}"
    return _sign(value, signed=signed) + words


def percent(share: float) -> str:
    """Write a share of one as per cent, to two digits."""
    if not math.isfinite(share):
        return _DASH
    size = 100 * abs(share)
    if size and size < _FEW:
        return f"{_sign(share)}{_powers(size)} %"
    return _sign(share) + (f"{size:.0f} %" if size >= 10 or not size else f"{size:.2g} %")


def _powers(size: float) -> str:
    digits, _, power = f"{size:.1e}".partition("e")
    return f"{digits}e{int(power):+}"


def _sign(value: float, *, signed: bool = False) -> str:
    if value < 0:
        return MINUS
    return "+" if signed and value > 0 else ""


def scaled(value: float, limit: float) -> str:
    """Return the CSS of a value between -1 and 1: what `limit` is for the colour or the bar."""
    share = value / limit if limit > 0 and math.isfinite(value) else 0.0
    return f"--v:{min(1.0, max(-1.0, share)):.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> Markup:
    """Return a table that scrolls where it is too wide; the first cell of a row is its head."""
    top = element("tr", *(element("th", each, scope="col") for each in head))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", x) for x in row[1:]))
        for row in rows
    )
    named = [element("caption", caption)] if caption else []
    inside = element("table", *named, element("thead", top), element("tbody", *body))
    return element("div", inside, class_="wide", tabindex="0", role="region", aria_label=caption)


def details(summary: str, *inside: str) -> Markup:
    """Return what is shown when it is asked for."""
    return element("details", element("summary", summary), *inside)


def note(*words: str) -> Markup:
    """Return a paragraph of explanation."""
    return element("p", *words, class_="soft")


def panels(name: str, shown: Sequence[tuple[str, Markup]]) -> Markup:
    """Return panels of which one is seen at a time, all of them without a script.

    `name` is what the panels' labels are values of, as "Layer".
    """
    parts = (
        element(
            "section", element("h4", f"{name} {label}"), inside, class_="panel", data_name=label
        )
        for label, inside in shown
    )
    return element("div", *parts, class_="panels", data_switch=name)


def visible(text: str) -> str:
    """Return a token's text with signs for spaces and for all that would not be seen."""
    shown = "".join(_SPACE if each == " " else _visible(each) for each in text)
    return _on_carrier(shown) or _NOTHING


def running(text: str) -> str:
    """Return text as it runs in a sentence: spaces and line ends stay, the rest is made visible."""
    shown = "".join({" ": " ", "\n": f"{_LINE}\n"}.get(each) or _visible(each) for each in text)
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


def _visible(letter: str) -> str:
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
