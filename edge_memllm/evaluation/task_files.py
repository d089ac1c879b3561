"""Tasks from local JSON-lines files, one item a line, checked before anything is computed.

Every complaint names the file and the line. Knows no models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edge_memllm.errors import RequestError
from edge_memllm.evaluation.items import Item, Kind, Schema, find_schema

SUFFIX = ".jsonl"


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
