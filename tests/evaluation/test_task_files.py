from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_memllm import RequestError
from edge_memllm.evaluation import Item, Task, read_tasks
from edge_memllm.evaluation.task_files import SCHEMAS, find_schema


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> Task:
    (task,) = read_tasks([path], **options)
    return task


QUERY = {"query": "Question: why?", "choices": ["so", "because"], "gold": 1}
PLAIN = {"context": "Why?", "choices": ["so", "because"], "answer": 1, "source": "kept out"}
OPTIONS = {"context_options": ["the dog", "the cat"], "continuation": "barks.", "gold": 0}
WORD = {"context": "The dog", "continuation": "barks"}
PAIR = {"sentence_good": "A dog barks.", "sentence_bad": "A dog bark.", "UID": "agreement"}
PIQA = {"goal": "dig a hole", "sol1": "with a spade", "sol2": "with a spoon", "label": 0}


@pytest.mark.parametrize(
    ("row", "kind", "item"),
    [
        (QUERY, "choices", Item(("Question: why? ",), ("so", "because"), 1)),
        (PLAIN, "choices", Item(("Why? ",), ("so", "because"), 1)),
        (OPTIONS, "contexts", Item(("the dog ", "the cat "), ("barks.",), 0)),
        (WORD, "continuation", Item(("The dog ",), ("barks",))),
        (PAIR, "pairs", Item((" ",), ("A dog barks.", "A dog bark."))),
        (
            PIQA,
            "choices",
            Item(("Question: dig a hole\nAnswer: ",), ("with a spade", "with a spoon"), 0),
        ),
    ],
)
def test_each_schema_is_known_by_its_keys(
    tmp_path: Path, row: dict[str, Any], kind: str, item: Item
) -> None:
    found = read(write(tmp_path / "task.jsonl", row))
    assert found == Task("task", kind, (item,), None)


def test_every_schema_is_tried() -> None:
    rows = (QUERY, PLAIN, OPTIONS, WORD, PAIR, PIQA)
    assert [find_schema(row) for row in rows] == list(SCHEMAS)


@pytest.mark.parametrize(
    ("row", "context"),
    [
        (WORD | {"context": "1 + 1 =\n"}, "1 + 1 =\n"),
        (WORD | {"continuation": " barks"}, "The dog"),
        (QUERY | {"query": "Answer: "}, "Answer: "),
        (WORD | {"context": ""}, " "),
    ],
)
def test_white_space_that_is_there_is_not_doubled(
    tmp_path: Path, row: dict[str, Any], context: str
) -> None:
    assert read(write(tmp_path / "task.jsonl", row)).items[0].contexts == (context,)


@pytest.mark.parametrize(
    ("row", "context"),
    [
        (QUERY, "Question: why?\nAnswer: "),
        (PAIR, "\nAnswer: "),
        (WORD | {"context": "The dog "}, "The dog \nAnswer: "),
    ],
)
def test_a_delimiter_that_was_asked_for_stands_as_it_is(
    tmp_path: Path, row: dict[str, Any], context: str
) -> None:
    task = read(write(tmp_path / "task.jsonl", row), delimiter="\nAnswer: ")
    assert task.items[0].contexts == (context,)


def test_a_folder_is_a_group(tmp_path: Path) -> None:
    folder = tmp_path / "blimp"
    folder.mkdir()
    (folder / "SOURCE.md").write_text("not a task")
    for name in ("b", "a"):
        write(folder / f"{name}.jsonl", PAIR)
    found = read_tasks([folder, write(tmp_path / "x.jsonl", WORD)])
    assert [(task.name, task.group) for task in found] == [
        ("blimp/a", "blimp"),
        ("blimp/b", "blimp"),
        ("x", None),
    ]


def test_tasks_of_one_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    paths = [tmp_path / name / "valid.jsonl" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        write(path, WORD)
    assert [task.name for task in read_tasks(paths)] == [str(path) for path in paths]


def test_the_limit_takes_the_first_items(tmp_path: Path) -> None:
    rows = [WORD | {"continuation": word} for word in ("a", "b", "c")]
    path = write(tmp_path / "task.jsonl", *rows, "not an item")
    found = read(path, limit=2)
    assert [item.continuations for item in found.items] == [("a",), ("b",)]


def test_labels_may_stand_in_a_file_beside_it(tmp_path: Path) -> None:
    bare = {key: value for key, value in PIQA.items() if key != "label"}
    path = write(tmp_path / "valid.jsonl", bare, bare)
    with pytest.raises(RequestError, match=r"valid.jsonl, line 1: key 'label' is missing"):
        read(path)
    labels = tmp_path / "valid-labels.lst"
    labels.write_text("0\n1\n")
    assert [item.answer for item in read(path).items] == [0, 1]
    labels.write_text("0\n")
    with pytest.raises(RequestError, match=r"valid-labels\.lst: it has not as many lines as"):
        read(path)
    labels.write_text("0\n2\n")
    with pytest.raises(RequestError, match="line 2: label is 2, expected a number from 0 to 1"):
        read(path)
    labels.write_text("0\nx\n")
    with pytest.raises(RequestError, match=r"valid-labels.lst, line 2: not JSON"):
        read(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "found list, expected a JSON object"),
        ({"text": "x"}, "found the keys 'text', expected those of one schema: query, choices"),
        (
            {"context": "x", "chain_of_thought": "y", "answer": "1"},
            "the answer has to be generated",
        ),
        (QUERY | {"query": 3}, "query is 3, expected a string"),
        (QUERY | {"choices": "ab"}, "choices is 'ab', expected a list of 2 to 1000 strings"),
        (QUERY | {"choices": ["a"]}, "choices is a list of 1, expected a list of 2"),
        (QUERY | {"choices": ["a", 3]}, "choices holds 3, expected text only"),
        (QUERY | {"choices": ["a", ""]}, "choices holds '', expected text only"),
        (QUERY | {"gold": 2}, "gold is 2, expected a number from 0 to 1"),
        (QUERY | {"gold": True}, "gold is True, expected a number"),
        (QUERY | {"gold": "1"}, "gold is '1', expected a number"),
        (OPTIONS | {"continuation": ""}, "continuation is empty, expected text"),
        (OPTIONS | {"gold": -1}, "gold is -1, expected a number"),
        (PAIR | {"sentence_bad": None}, "sentence_bad is None, expected a string"),
        (WORD, "the keys are context, continuation, those of the first line are query, choices"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    like = next(
        (good for good in (OPTIONS, PAIR) if isinstance(row, dict) and {*good} == {*row}), QUERY
    )
    path = write(tmp_path / "task.jsonl", like, row)
    with pytest.raises(RequestError, match=rf"task\.jsonl, line 2: {message}"):
        read(path)


@pytest.mark.parametrize("line", [b"{", b"", b"\xff{}", b"[" * 100_000])
def test_a_line_that_is_not_json_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(json.dumps(QUERY).encode() + b"\n" + line + b"\n")
    with pytest.raises(RequestError, match=r"task\.jsonl, line 2: not JSON"):
        read(path)


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").touch()
    with pytest.raises(RequestError, match="the file is empty, expected one item a line"):
        read(tmp_path / "task.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError, match=r"folder: the folder has no .jsonl files"):
        read(tmp_path / "folder")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.jsonl")
