"""Items of a task: what is scored and which answer is right, from the schemas in use.

A schema is known by its keys; other keys are not looked at. Knows JSON objects and text, nothing
of files or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edge_memllm.checked_values import is_integer
from edge_memllm.errors import RequestError

Kind = Literal["choices", "contexts", "continuation", "pairs"]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """Texts to compare. One of `contexts` and `continuations` has a single entry.

    The right one is number `answer` of the other; where both are single, it is the only one.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int = 0


@dataclass(frozen=True, slots=True)
class Schema:
    """One accepted form of a line: its keys, and how it becomes an item.

    `make(row, delimiter)` raises `RequestError` saying what is wrong; None takes the schema's own
    delimiter.
    """

    kind: Kind
    keys: tuple[str, ...]
    make: Callable[[Row, str | None], Item]


def find_schema(row: object) -> Schema:
    """Return the schema whose keys an object has; raises `RequestError` if there is none."""
    if not isinstance(row, dict):
        raise RequestError(f"found {type(row).__name__}, expected a JSON object.")
    for schema in SCHEMAS:
        if row.keys() >= set(schema.keys):
            return schema
    if "answer" in row and "chain_of_thought" in row:
        raise RequestError(
            "the answer has to be generated, and only likelihoods are measured here. Use "
            "lm-evaluation-harness for it."
        )
    known = "; ".join(", ".join(schema.keys) for schema in SCHEMAS)
    found = ", ".join(map(ascii, list(row)[:8]))
    raise RequestError(f"found the keys {found:.160}, expected those of one schema: {known}.")


def _choices(row: Row, delimiter: str | None, names: tuple[str, str, str]) -> Item:
    context, choices, answer = names
    texts = _texts(row, choices)
    question = _text(row, context)
    return Item(
        (question + _between(question, texts, delimiter),), texts, _index(row, answer, len(texts))
    )


def _gauntlet(row: Row, delimiter: str | None) -> Item:
    return _choices(row, delimiter, ("query", "choices", "gold"))


def _plain(row: Row, delimiter: str | None) -> Item:
    return _choices(row, delimiter, ("context", "choices", "answer"))


def _contexts(row: Row, delimiter: str | None) -> Item:
    contexts, continuation = _texts(row, "context_options"), _filled(row, "continuation")
    joined = tuple(text + _between(text, (continuation,), delimiter) for text in contexts)
    return Item(joined, (continuation,), _index(row, "gold", len(contexts)))


def _continuation(row: Row, delimiter: str | None) -> Item:
    context, continuation = _text(row, "context"), _filled(row, "continuation")
    return Item((context + _between(context, (continuation,), delimiter),), (continuation,))


def _pair(row: Row, delimiter: str | None) -> Item:
    # The sentences stand behind a space, as lm-evaluation-harness has them.
    sentences = (_filled(row, "sentence_good"), _filled(row, "sentence_bad"))
    return Item((" " if delimiter is None else delimiter,), sentences)


def _physical(row: Row, delimiter: str | None) -> Item:
    """PIQA, with the prompt of lm-evaluation-harness."""
    solutions = (_filled(row, "sol1"), _filled(row, "sol2"))
    question = f"Question: {_text(row, 'goal')}\nAnswer:"
    return Item((question + (" " if delimiter is None else delimiter),), solutions, _label(row))


def _label(row: Row) -> int:
    if "label" not in row:
        raise RequestError("key 'label' is missing, and there is no file of labels beside it.")
    return _index(row, "label", 2)


SCHEMAS = (
    Schema("choices", ("query", "choices", "gold"), _gauntlet),
    Schema("choices", ("context", "choices", "answer"), _plain),
    Schema("contexts", ("context_options", "continuation", "gold"), _contexts),
    Schema("continuation", ("context", "continuation"), _continuation),
    Schema("pairs", ("sentence_good", "sentence_bad"), _pair),
    Schema("choices", ("goal", "sol1", "sol2"), _physical),
)


def _between(context: str, continuations: tuple[str, ...], delimiter: str | None) -> str:
    """What to put behind a context: one space, unless there is white space already."""
    if delimiter is not None:
        return delimiter
    spaced = context[-1:].isspace() or all(text[0].isspace() for text in continuations)
    return "" if spaced else " "


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise RequestError(f"{key} is {_shown(value)}, expected a string.")
    return value


def _filled(row: Row, key: str) -> str:
    value = _text(row, key)
    if not value:
        raise RequestError(f"{key} is empty, expected text.")
    return value


def _texts(row: Row, key: str) -> tuple[str, ...]:
    values = row[key]
    if not isinstance(values, list) or not 2 <= len(values) <= 1000:
        raise RequestError(f"{key} is {_shown(values)}, expected a list of 2 to 1000 strings.")
    for value in values:
        if not isinstance(value, str) or not value:
            raise RequestError(f"{key} holds {_shown(value)}, expected text only.")
    return tuple(values)


def _index(row: Row, key: str, count: int) -> int:
    value = row[key]
    if not is_integer(value) or not 0 <= value < count:
        raise RequestError(f"{key} is {_shown(value)}, expected a number from 0 to {count - 1}.")
    return value


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!a:.60}"
