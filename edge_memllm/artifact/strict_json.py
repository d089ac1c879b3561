"""JSON from files nobody has checked yet: one strict parser, and objects of exact keys.

It refuses what the standard parser lets through (duplicate keys, NaN, numbers that overflow, deep
nesting, halves of surrogate pairs) and knows nothing of manifests or tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from functools import partial
from typing import NoReturn

from edge_memllm.checked_values import Fields, described
from edge_memllm.errors import ArtifactError

MAX_JSON_BYTES = 1 << 20
# What walks a value afterwards may recurse; no file of ours or of a tokenizer comes near.
_MAX_DEPTH = 64


def parse_json_object(data: bytes, where: str, most: int = MAX_JSON_BYTES) -> dict[str, object]:
    """Parse `data` as one JSON object.

    Raises `ArtifactError` naming `where` when it is larger than `most` bytes, is not UTF-8, is not
    JSON, repeats a key, holds a number that is not finite or a text that is not Unicode, is nested
    too deeply, or is not an object.
    """
    if len(data) > most:
        raise ArtifactError(f"{where}: {len(data)} bytes of JSON, the limit is {most}.")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise ArtifactError(f"{where}: the JSON is nested too deeply.") from None
    except ValueError as error:  # bad UTF-8, bad JSON, and what the hooks below refuse
        raise ArtifactError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: found {_shown(value)}, expected a JSON object.")
    _check_values(value, where)
    return value


def _check_values(value: object, where: str) -> None:
    """Raise `ArtifactError` for deep nesting and for half a surrogate pair, wherever it is."""
    level: list[object] = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.keys()
                inner += each.values()
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and not each.isascii():
                _check_text(each, where)
        if not inner:
            return
        level = inner
    raise ArtifactError(f"{where}: the JSON is nested too deeply.")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ArtifactError(
            f"{where}: the text {_quote(text)} is not Unicode: half of a surrogate pair."
        ) from None


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {_quote(key)} appears twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large for a float")
    return number


def exact_fields(value: object, where: str, keys: Collection[str]) -> Fields:
    """Return the fields of an object in a file, whose keys must be exactly `keys`.

    They and what is read from them raise `ArtifactError` naming where, the key, what was found and
    what was expected.
    """
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: found {_shown(value)}, expected an object.")
    if missing := sorted(set(keys) - value.keys()):
        raise ArtifactError(f"{where}: key '{missing[0]}' is missing. Export the model again.")
    if unknown := sorted(value.keys() - set(keys)):
        raise ArtifactError(
            f"{where}: unknown key {_quote(unknown[0])}. "
            "Upgrade edge-memllm or export the model again."
        )
    return Fields(value, partial(_refusal, where))


def _refusal(where: str, key: str, value: object, expected: str) -> ArtifactError:
    return ArtifactError(f"{where}: {key} is {_shown(value)}, expected {expected}.")


def _shown(value: object) -> str:
    return described(value, _quote)


def _quote(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
