"""Alterations from a TOML file: a list of tables `[[edit]]`, strictly read.

[[edit]]
tokens = ["London", "#1234"]     # words as elsewhere on the command line, or numbers
layers = [0, 1, 2]               # all when left out
like = "Paris"                   # or: scale = 0.5, or: blank = true
strength = 0.8                   # only with like; 1 when left out
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_memllm.errors import RequestError
from edge_memllm.overlays.editing import Alteration

_KEYS = ("tokens", "layers", "scale", "blank", "like", "strength")


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
    words = _list(edit, "tokens", str, where)
    if not words:
        raise RequestError(f"{where}: tokens is empty or missing, expected words.")
    layers = _list(edit, "layers", int, where) if "layers" in edit else None
    like = _value(edit, "like", (str,), where)
    try:
        return Alteration(
            tokens=tuple(map(find, words)),
            layers=None if layers is None else tuple(layers),
            scale=_value(edit, "scale", (int, float), where),
            blank=bool(_value(edit, "blank", (bool,), where)),
            like=None if like is None else find(like),
            strength=_value(edit, "strength", (int, float), where),
        )
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _list(edit: dict[str, Any], key: str, kind: type, where: str) -> list[Any]:
    found = edit.get(key, [])
    if not isinstance(found, list) or any(type(each) is not kind for each in found):
        raise RequestError(f"{where}: {key} is {found!r:.80}, expected a list of {kind.__name__}.")
    return found


def _value(edit: dict[str, Any], key: str, kinds: tuple[type, ...], where: str) -> Any:
    found = edit.get(key)
    if found is not None and type(found) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise RequestError(f"{where}: {key} is {found!r:.80}, expected {names}.")
    return found
