"""HTML that is escaped by the way it is made, and the few elements that all sections share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

MINUS = "\N{MINUS SIGN}"
_DASH = "\N{EN DASH}"
_VOID = frozenset({"link", "meta"})  # elements without an end
_FEW, _MANY = 1e-3, 1e5  # sizes beyond which a figure is written with an exponent


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
