"""Write docs/fields.md from the table of fields; with --check, only compare and say so."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_memllm.server.parameters import (
    ALL,
    BOTH,
    CHAT,
    CHUNKED,
    COMPLETIONS,
    LLAMA,
    MESSAGES,
    OPENAI,
    PARAMETERS,
    RESPONSES,
    STREAMED,
    Parameter,
)

PAGE = Path(__file__).with_name("fields.md")

_INTRODUCTION = """\
# Fields of a request

Generated from `edge_memllm/server/parameters.py` by `make docs`; edit the table, not this
page. [serving.md](serving.md) has the rest.

A field that is not here is refused with 400 and its name; null counts as left out."""

_HONOURED = (
    (ALL, "Everywhere"),
    (STREAMED, "Everywhere but in messages"),
    (OPENAI, "OpenAI's protocols"),
    (CHUNKED, "Completions, chat, and llama.cpp's completion"),
    (BOTH, "Completions and chat"),
    (COMPLETIONS, "Completions"),
    (CHAT, "Chat"),
    (RESPONSES, "Responses"),
    (MESSAGES, "Messages"),
    (LLAMA, "llama.cpp's completion"),
)


def reference() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *_done(), *_not_done()]) + "\n"


def _done() -> Iterator[str]:
    for endpoints, title in _HONOURED:
        found = [each for each in PARAMETERS if each.honoured and each.endpoints == endpoints]
        yield f"\n## {title}\n\n| Field | |\n| --- | --- |"
        yield from (f"| `{each.name}` | {each.meaning} |" for each in found)


def _not_done() -> Iterator[str]:
    yield (
        "\n## Known, and not honoured\n\n"
        "Taken with the values that ask for nothing; any other is refused, and told why.\n\n"
        "| Field | of | asks for nothing | why not |\n| --- | --- | --- | --- |"
    )
    for each in PARAMETERS:
        if not each.honoured:
            row = (f"`{each.name}`", ", ".join(each.endpoints), _values(each), each.meaning)
            yield f"| {' | '.join(row)} |"


def _values(parameter: Parameter) -> str:
    shown: Iterable[str] = (f"`{json.dumps(each)}`" for each in parameter.nothing)
    return ", ".join(shown)


def main() -> int:
    """Write the page, or with ``--check`` return 1 when it is not what would be written."""
    text = reference()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/fields.md differs from its table: run `make docs` and commit it.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
