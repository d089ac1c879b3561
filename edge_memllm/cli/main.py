"""The entry point: one parser, one dispatch, one place where an exception becomes a message.

Knows the commands by name and place, and nothing of what they do. Exit codes: 0 done, 1 an error
that the message explains, 2 wrong usage, 70 a bug of ours, 130 Ctrl-C, 141 closed pipe. A second
Ctrl-C ends the process at once, whatever runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from edge_memllm import __version__
from edge_memllm.cli.options import Command, Commands, HelpFormatter, add_parser
from edge_memllm.cli.output import prepare_streams, say, styled, unwritten_output
from edge_memllm.cli.suggestions import SuggestingParser
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.process.interrupts import interruptible

# Name, the module below `edge_memllm.cli` that has it under this name in capitals, and what for.
COMMANDS = (
    ("demo", "demo", "show all of it with the model that comes along"),
    ("train", "train", "train a checkpoint from text"),
    ("convert", "train", "make a MemoryLLM of a dense checkpoint"),
    ("export", "export", "make an artifact from a checkpoint"),
    ("requantize", "export", "store an artifact's table in another codec"),
    ("sweep", "analysis.sweep", "compare table codecs: size, error, quality, speed"),
    ("verify", "inspection", "check every byte of an artifact"),
    ("run", "run", "generate text, once or in conversation"),
    ("serve", "serve", "serve a model over HTTP, as OpenAI's API does"),
    ("overlay", "overlay", "change rows of chosen tokens on top of an artifact"),
    ("list", "models", "list the models that were exported into the cache"),
    ("remove", "models", "remove models from the cache"),
    ("inspect", "inspection", "show what an artifact holds and needs"),
    ("eval", "analysis.evaluation", "measure perplexity on text, and scores on tasks"),
    ("explain", "analysis.explain", "look into the memory of a model"),
    ("layers", "analysis.layers", "say which feed-forward layers of a dense model are tables"),
    ("suppress", "analysis.suppress", "find what promotes words and turn it down"),
    ("bench", "analysis.bench", "measure speed, memory and reads"),
    ("completion", "completion", "print what completes commands in a shell"),
)
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141

_DESCRIPTION = """\
Language models whose feed-forward layers are one lookup table: a token becomes a row read from
flash, the row enters a small ONNX graph, the graph gives the next token."""

_EPILOG = """\
the way of a model:
  edge-memllm train --preset tiny --data corpus.txt --out checkpoint
  edge-memllm export checkpoint artifact
  edge-memllm run artifact --prompt "Once upon a time"

'edge-memllm COMMAND --help' explains one command. 'edge-memllm demo' shows all of it."""


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser with every command in it, all of them empty but `only` where it is given.

    So a command line loads the modules of one command, and `edge-memllm --help` of none.
    """
    parser = SuggestingParser(
        prog="edge-memllm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edge-memllm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, _, summary in COMMANDS:
        below = add_parser(commands, name, summary)
        if only in (None, name):
            command(name).add_to(below)
    return parser


def command(name: str) -> Command[Any] | Commands:
    """Return a command by its name; its module is loaded for it."""
    module = next(module for each, module, _ in COMMANDS if each == name)
    found: Command[Any] | Commands = getattr(
        import_module(f"edge_memllm.cli.{module}"), name.upper()
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never raises, except under debugging.

    With ``EDGE_MEMLLM_DEBUG=1`` in the environment exceptions are let through.
    """
    prepare_streams()
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = build_parser(words[0] if words else "").parse_args(words)
    except SystemExit as leaving:  # argparse has printed the help or what is wrong
        code = leaving.code if isinstance(leaving.code, int) else 0
        return run_command(lambda _: code, argparse.Namespace())
    return run_command(arguments.execute, arguments)


def run_command(execute: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run one command and return its exit code; what goes wrong becomes one line on stderr."""
    try:
        with interruptible():
            code = execute(arguments)
    except KeyboardInterrupt as error:
        say("\n".join(["", *getattr(error, "__notes__", [])]))
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_CLOSED_PIPE
    except SystemExit:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if os.environ.get("EDGE_MEMLLM_DEBUG") == "1":
            raise
        code = _explain(error)
    else:
        unwritten = unwritten_output()
        if unwritten is not None:
            code = _explain(unwritten)
    unwritten_output()  # not while the interpreter ends, where it would be told once more
    return code


def _explain(error: BaseException) -> int:
    """Print one line about ``error`` and return the exit code that goes with it."""
    mark = styled("error:", "error", sys.stderr)
    match error:
        case EdgeMemLLMError():
            say(f"{mark} {error}")
        case BrokenPipeError():
            return EXIT_CLOSED_PIPE
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            say(f"{mark} {where}{error.strerror or error}.")
        case MemoryError():
            say(
                f"{mark} there is not enough memory for this. Close other programs, or ask for "
                "less: a smaller model, context or batch."
            )
        case RecursionError():
            say(f"{mark} something that was given is nested too deeply to be read.")
        case _:
            say(
                f"{mark} {type(error).__name__}: {error}\n"
                "This is a bug in edge-memllm. Run the command again with EDGE_MEMLLM_DEBUG=1 "
                "and send us what it prints (CONTRIBUTING.md says how)."
            )
            return EXIT_BUG
    return 1


if __name__ == "__main__":
    sys.exit(main())
