"""Alterations from a TOML file: a list of tables `[[edit]]`, strictly read.

[[edit]]
tokens = ["London", "#1234"]     # words as elsewhere on the command line, or numbers
layers = [0, 1, 2]               # all when left out
like = "Paris"                   # or: scale = 0.5, or: blank = true
strength = 0.8                   # only with like; 1 when left out
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_memllm.checked_values import Fields, wrong_value
from edge_memllm.errors import RequestError
from edge_memllm.overlays.editing import Alteration
from edge_memllm.overlays.overlay import LARGEST_FACTOR, MOST_LAYERS

_KEYS = ("tokens", "layers", "scale", "blank", "like", "strength")
_WORD = re.compile(r"(?s).*")


def read_edits(path: Path, find: Callable[[str], int]) -> list[Alteration]:
    """Read alterations; `find` returns the token that a word is.

    Raises `RequestError` naming file, edit and key for what cannot be.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: this is not TOML in UTF-8 ({error}).") from error
    edits = content.pop("edit", [])
    if content or not isinstance(edits, list) or not edits:
        found = f"the key '{next(iter(content))}'" if content else "no list of edits"
        raise RequestError(f"{path}: found {found}, expected tables [[edit]] and nothing else.")
    return [_alteration(each, f"{path}, edit {n}", find) for n, each in enumerate(edits, 1)]


def _alteration(edit: Any, where: str, find: Callable[[str], int]) -> Alteration:
    if not isinstance(edit, dict):
        raise RequestError(f"{where}: found {edit!r:.80}, expected a table.")
    unknown = sorted(edit.keys() - set(_KEYS))
    if unknown:
        raise RequestError(f"{where}: unknown key '{unknown[0]}', expected {', '.join(_KEYS)}.")
    fields = Fields(edit, wrong_value)
    try:
        return _read(fields, find)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _read(fields: Fields, find: Callable[[str], int]) -> Alteration:
    words = fields.texts("tokens", _WORD, "words") if fields.value("tokens") else ()
    if not words:
        raise RequestError("tokens is empty or missing, expected words.")
    given = "layers" in fields.values
    like = fields.optional_text("like", _WORD, "a word")
    return Alteration(
        tokens=tuple(map(find, words)),
        layers=fields.integers("layers", 0, MOST_LAYERS - 1) if given else None,
        scale=fields.optional_number("scale", -LARGEST_FACTOR, LARGEST_FACTOR),
        blank=fields.flag("blank"),
        like=None if like is None else find(like),
        strength=fields.optional_number("strength", -LARGEST_FACTOR, LARGEST_FACTOR),
    )
