"""What the paper does not report and this project has measured, on pages of its own."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper.page.layout import MISSING, Section, table

_WHERE = (
    (
        "How often a cache has the record that text asks for, by size and policy; which storage",
        "reading.md",
    ),
    ("Time to the first token, speed from storage against memory", "streaming.md"),
    ("FFN-M once per distinct token of a batch, against plain", "distinct-tokens.md"),
    ("Making a MemoryLLM of a trained dense model", "conversion.md"),
)


def lacking_section(folder: Path) -> Section:
    """Return the section, with links to those pages of docs/results that are there."""
    rows = [
        [words, f"[{name}]({name})" if (folder / name).exists() else MISSING]
        for words, name in _WHERE
    ]
    return Section("What the paper lacks", table(["", "measured in"], rows))
