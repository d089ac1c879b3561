"""Write docs/cli.md from the help of every command; with --check, only compare and say so."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from edge_memllm.cli.main import build_parser

PAGE = Path(__file__).with_name("cli.md")

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # newer Pythons colour help at a terminal

_INTRODUCTION = """\
# The command line

Generated from `--help` by `make docs`; edit the help, not this page.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 70 a bug of ours,
130 Ctrl-C, 141 the reader of our output went away. A second Ctrl-C ends a command at once, whatever
it does. Results go to stdout, progress and statistics to stderr, so `--json` output can be piped as
it is. Progress is a bar for each stage, and without a terminal a line when one begins, every ten
seconds and when it ends. Ctrl-C says what is kept, and how to go on. Colours are for terminals;
`NO_COLOR=1` leaves them out.
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *_sections("edge-memllm", build_parser())])


def _sections(title: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """A command, then those below it; argparse offers no public way to ask for them."""
    yield _section(title, parser)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, each in action.choices.items():
                yield from _sections(f"{title} {name}", each)


def _section(title: str, parser: argparse.ArgumentParser) -> str:
    shown = _COLOUR.sub("", parser.format_help()).rstrip()
    return f"## {title}\n\n```text\n{shown}\n```\n"


def main() -> int:
    """Write the page, or with ``--check`` return 1 when it is not what would be written."""
    text = reference()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/cli.md differs from --help: run `make docs` and commit it.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
