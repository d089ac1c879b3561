"""What token rows can do for a dense model.

python -m benchmarks.dense control MODEL --text TEXT --runs RUNS     students with rows and without
python -m benchmarks.dense retrofit MODEL --text TEXT --runs RUNS    rows added, beside LoRA
python -m benchmarks.dense first MODEL --text TEXT --runs RUNS    only the first layer in a table
python -m benchmarks.dense page [--check]       the pages of docs/results, of what is stored there

MODEL is the folder of a dense checkpoint of transformers; ``python -m benchmarks.dense folder FILE
MODEL`` makes one of a GGUF file. TEXT has documents behind title lines ``= title =``; whole
documents are held out. RUNS keeps all that was done: the same command goes on where it stopped.
Figures go to docs/results, or with ``--out FILE`` elsewhere. What each layer is worth is measured
by ``edge-memllm layers``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.dense.page import write_page
from benchmarks.dense.page_parts import CONTROL, FIRST, RETROFIT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dense",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("page").add_argument("--check", action="store_true")
    folder = commands.add_parser("folder")
    folder.add_argument("file", type=Path)
    folder.add_argument("model", type=Path)
    for name, stored in (("control", CONTROL), ("retrofit", RETROFIT), ("first", FIRST)):
        each = commands.add_parser(name)
        each.add_argument("model", type=Path)
        each.add_argument("--text", type=Path, nargs="+", required=True)
        each.add_argument("--runs", type=Path, required=True)
        each.add_argument("--out", type=Path, default=stored)
        each.add_argument("--threads", type=int, default=1)
        each.add_argument("--only", help="one student, kind of what is added, or replacement")
        each.add_argument(
            "--set", action="append", default=[], metavar="NAME=NUMBER", help="a field of its Size"
        )
    return _run(parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "page":
        return write_page(check=arguments.check)
    if arguments.command == "folder":
        _write_folder(arguments.file, arguments.model)
        return 0
    import torch

    torch.set_num_threads(arguments.threads)
    found = _measured(arguments)
    if not found:
        return 0
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    given = arguments.model, arguments.text, arguments.runs
    if arguments.command == "control":
        from benchmarks.dense import control

        size = _sized(control.Size, arguments.set)
        return control.control(*given, size, arguments.only)
    if arguments.command == "first":
        from benchmarks.dense import first_layer

        size = _sized(first_layer.Size, arguments.set)
        return first_layer.first_layer(*given, size, arguments.only)
    from benchmarks.dense import retrofit

    size = _sized(retrofit.Size, arguments.set)
    return retrofit.retrofit(*given, size, arguments.only)


def _sized(kind: type[Any], settings: Sequence[str]) -> Any:
    """A Size with some of its fields set."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    values = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in fields:
            sys.exit(f"--set {setting}: no such field; there are {', '.join(fields)}.")
        values[name] = fields[name](value)
    return kind(**values)


def _write_folder(file: Path, model: Path) -> None:
    """Write the float weights of a GGUF file, as transformers dequantises them, and its texts."""
    from benchmarks.real.reference import Reference

    reference = Reference(file, 1)
    reference.model.save_pretrained(model)
    reference.tokenizer.save_pretrained(model)


if __name__ == "__main__":
    sys.exit(main())
