"""The parts a section of the page is made of: text, tables, claims, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MISSING = "not measured"
TOKENS = "million tokens"  # the axis of what training has seen
_FACTOR = 2.0  # relative changes from here on are written as factors
VARIANTS = {
    "base": "Base",
    "flex-3": "Flex-3",
    "flex-2": "Flex-2",
    "flex-1": "Flex-1",
    "memoryllm": "MemoryLLM",
    "base-active-flex-3": "Base, Flex-3's active",
    "base-active": "Base, MemoryLLM's active",
}
# At equal total parameters, as the paper orders them by quality.
FAMILY = ("base", "flex-3", "flex-2", "flex-1", "memoryllm")
# The same colour for a model in all pictures.
COLOUR = {
    "base": 0,
    "flex-3": 2,
    "flex-2": 6,
    "flex-1": 4,
    "memoryllm": 1,
    "base-active-flex-3": 7,
    "base-active": 3,
    "paper": 11,
}

Entries = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """Something the paper says, and what was found here."""

    paper: str
    here: str
    verdict: str


@dataclass(frozen=True)
class Section:
    """One part of the page; `measured` names what made its figures, pictures go by their files."""

    title: str
    text: str
    claims: Sequence[Claim] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    measured: str | None = None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def image(file: str, words: str) -> str:
    """Return a picture of docs/images, as docs/results shows it."""
    return f"![{words}](../images/{file})"


def console(*commands: str) -> str:
    """Return commands as a block of the page."""
    return "\n".join(["```console", *commands, "```"])


def change(value: float) -> str:
    """Return a relative change in per cent, a large one as a factor."""
    if value >= _FACTOR:
        return f"x {1 + value:.1f}"
    return f"{value:+.2%}" if abs(value) < 0.1 else f"{value:+.1%}"


def increase(found: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Return the relative change of perplexity on the texts together; 0.01 is 1 % worse."""
    changed: float = found["together"]["perplexity"] / reference["together"]["perplexity"] - 1
    return changed


def first_seeds(entries: Entries) -> dict[str, Mapping[str, Any]]:
    """Return the entries of the first seed, by variant, in the order of the family."""
    found = {each["variant"]: each for each in entries.values() if each["seed"] == 1}
    return {name: found[name] for name in VARIANTS if name in found}
