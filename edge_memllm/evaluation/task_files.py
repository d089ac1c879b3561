"""Tasks from local JSON-lines files, one item a line, checked before anything is computed.

Every complaint names the file and the line. Knows no models.

A schema is known by its keys; other keys are not looked at.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from edge_memllm.checked_values import is_integer
from edge_memllm.errors import RequestError

Kind = Literal["choices", "contexts", "continuation", "pairs"]
Row = Mapping[str, Any]

SUFFIX = ".jsonl"


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


@dataclass(frozen=True, slots=True)
class Task:
    """The items of one file; `group` is the name of the folder that was asked for, if one was."""

    name: str
    kind: Kind
    items: tuple[Item, ...]
    group: str | None = None


def read_tasks(
    paths: Sequence[Path], *, limit: int | None = None, delimiter: str | None = None
) -> list[Task]:
    """Read a task from each file, and from each `.jsonl` file of a folder, by name.

    `limit` takes the first items of each file. `delimiter` stands between a context and what
    follows it; None is one space, or nothing where there is white space already. Raises
    `RequestError` for a line that is not an item, naming file and line.
    """
    files = [found for path in paths for found in _files(path)]
    names = Counter(name for name, _, _ in files)
    return [
        Task(name if names[name] == 1 else str(path), *_read(path, limit, delimiter), group)
        for name, path, group in files
    ]


def _files(path: Path) -> Iterator[tuple[str, Path, str | None]]:
    """Yield name, file and group of a path."""
    if not path.is_dir():
        yield path.stem, path, None
        return
    found = sorted(path.glob(f"*{SUFFIX}"))
    if not found:
        raise RequestError(f"{path}: the folder has no {SUFFIX} files. Name a file, or another.")
    group = path.resolve().name
    for file in found:
        yield f"{group}/{file.stem}", file, group


def _read(path: Path, limit: int | None, delimiter: str | None) -> tuple[Kind, tuple[Item, ...]]:
    schema: Schema | None = None
    items: list[Item] = []
    for number, row in islice(_rows(path), limit):
        try:
            schema = _same(find_schema(row), schema)
            items.append(schema.make(row, delimiter))
        except RequestError as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
    if schema is None:
        raise RequestError(f"{path}: the file is empty, expected one item a line.")
    return schema.kind, tuple(items)


def _same(found: Schema, first: Schema | None) -> Schema:
    if first is not None and found is not first:
        raise RequestError(
            f"the keys are {', '.join(found.keys)}, those of the first line are "
            f"{', '.join(first.keys)}. Put them into files of their own."
        )
    return found


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each line; labels that stand in a file beside it are put in."""
    labels = path.with_name(f"{path.stem}-labels.lst")
    with path.open("rb") as file:
        if not labels.exists():
            yield from ((number, _parse(line, path, number)) for number, line in _lines(file))
            return
        with labels.open("rb") as beside:
            for (number, line), (_, label) in _together(file, beside, path, labels):
                row, value = _parse(line, path, number), _parse(label, labels, number)
                yield number, row | {"label": value} if isinstance(row, dict) else row


def _lines(file: Any) -> Iterator[tuple[int, bytes]]:
    return enumerate(file, 1)


def _together(
    file: Any, beside: Any, path: Path, labels: Path
) -> Iterator[tuple[tuple[int, bytes], tuple[int, bytes]]]:
    try:
        yield from zip(_lines(file), _lines(beside), strict=True)
    except ValueError:
        raise RequestError(
            f"{labels}: it has not as many lines as {path}, expected one label for each item."
        ) from None


def _parse(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # not UTF-8, or not JSON
        problem = str(error)
    raise RequestError(
        f"{path}, line {number}: not JSON ({problem:.120}). Expected one JSON object a line."
    )
