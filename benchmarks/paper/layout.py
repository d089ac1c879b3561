"""What sections of the page are made of, and what the paper prints beside it."""

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
ATTENTION_ONLY = "attention-only"
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
    ATTENTION_ONLY: 5,
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


# What the paper prints (arXiv 2602.00398).
# Table 2, 50 B tokens of C4: active and total parameters in millions, C4 and Wikitext-2.
TABLE_2 = (
    ("Base", 737, 737, 19.730, 25.491),
    ("MemoryLLM", 402, 1208, 20.933, 27.258),
    ("MemoryLLM", 245, 737, 22.079, 29.976),
    ("Base", 265, 265, 23.190, 32.220),
)
# Table 1, MemoryLLM-1B by gain. Accuracies; what the paper calls SiQA is very probably SciQ.
TABLE_1 = {
    1.0: {"Wikitext-2": 24.348, "LAMBADA": 0.3613, "ARC-Easy": 0.5156, "Winogrande": 0.5233},
    0.9: {"Wikitext-2": 24.652, "LAMBADA": 0.3643, "ARC-Easy": 0.5043, "Winogrande": 0.5193},
    0.8: {"Wikitext-2": 25.517, "LAMBADA": 0.3546, "ARC-Easy": 0.4414, "Winogrande": 0.5178},
    0.7: {"Wikitext-2": 27.457, "LAMBADA": 0.3004, "ARC-Easy": 0.4168, "Winogrande": 0.4988},
    0.6: {"Wikitext-2": 32.614, "LAMBADA": 0.2002, "ARC-Easy": 0.3949, "Winogrande": 0.4901},
    0.5: {"Wikitext-2": 53.707, "LAMBADA": 0.1086, "ARC-Easy": 0.3170, "Winogrande": 0.5012},
}
# Table 7, MemoryLLM-1B: Wikitext-2 by bits of the table.
TABLE_7 = {16: 24.348, 8: 24.347, 4: 24.439}
# Table 8, MemoryLLM-1B: C4 by the share of the rank that is cut.
TABLE_8 = {0.0: 18.919, 0.1: 18.923, 0.2: 18.958, 0.3: 19.015, 0.4: 19.126, 0.5: 19.586}
# Table 6, 1B on one A100: gigabytes, milliseconds a token.
TABLE_6 = {
    "base": (9.541, 21.50),
    "flex-3": (7.825, 21.47),
    "flex-2": (7.409, 20.28),
    "flex-1": (7.025, 18.75),
    "memoryllm": (6.041, 14.42),
}
# Vocabulary and the FFN width of Base (Table 5): what the ratio |V| / 3K follows from.
SIZES = {"250M": (128_256, 2560), "750M": (128_256, 4272), "1B": (128_256, 5464)}
