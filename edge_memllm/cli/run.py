"""``edge-memllm run``: text from an artifact, once or in conversation."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm.cli.options import (
    add_command,
    add_json,
    add_loading,
    add_sampling,
    loading_keywords,
    positive_int,
)
from edge_memllm.cli.output import read_standard_input, write_json
from edge_memllm.errors import RequestError

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands
    from edge_memllm.model import Model
    from edge_memllm.request import Request

_DESCRIPTION = """\
Generate text. The prompt comes from --prompt, from standard input when that is a pipe or a file,
or from you: at a terminal a conversation starts (/help lists what you can say there).

With a chat template in the artifact the prompt is a message and the model answers; without one,
or with --raw, the model continues the text. The text goes to stdout as it is made, one line of
statistics follows on stderr."""

_EXAMPLES = """\
  edge-memllm run artifact
  edge-memllm run artifact --prompt "It was a dark and" --max-new-tokens 60
  edge-memllm run artifact --prompt "Dear Sir," --temperature 0.7 --top-p 0.9 --seed 7
  edge-memllm run artifact --stop "." --json < prompt.txt
  edge-memllm run artifact --speculate 8 < prompt.txt"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "run",
        execute,
        summary="generate text, once or in conversation",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an exported model")
    parser.add_argument("--prompt", metavar="TEXT", help="what to continue or answer")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=128,
        metavar="N",
        help="stop after N tokens at the latest (default: 128)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text; may be repeated",
    )
    parser.add_argument(
        "--stop-token-id",
        action="append",
        default=[],
        type=int,
        metavar="N",
        help="stop at this token as well; may be repeated",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="copy up to N tokens at a time from earlier in the text and keep those the model "
        "would have chosen: faster where the text repeats itself (default: 0, off)",
    )
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
    parser.add_argument("--no-stats", action="store_true", help="no line of statistics")
    add_json(parser)
    add_sampling(parser)
    add_loading(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    prompt = arguments.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = read_standard_input()
    if prompt is None and arguments.json:
        raise RequestError("--json answers one prompt. Give it with --prompt or on stdin.")

    import edge_memllm
    from edge_memllm.cli.output import StageBars
    from edge_memllm.cli.prompt import Session, request_of

    with StageBars() as bars:
        model = edge_memllm.load(arguments.artifact, progress=bars, **loading_keywords(arguments))
    with model:
        settings = request_of(arguments, model.sampling)
        if prompt is None:
            Session(model, settings, raw=arguments.raw, statistics=not arguments.no_stats).run()
        else:
            _answer_once(model, prompt, settings, arguments)
    return 0


def _answer_once(
    model: Model, prompt: str, settings: Request, arguments: argparse.Namespace
) -> None:
    """Generate from one prompt; the text appears as it is made, unless it goes into JSON."""
    from edge_memllm.cli.prompt import Answer, chat_prompt, has_template, statistics_line

    chat = has_template(model) and not arguments.raw
    ids = chat_prompt(model, [{"role": "user", "content": prompt}]) if chat else prompt
    answer = Answer()
    for piece in model.pieces(replace(settings, prompt=ids)):
        answer.add(piece)
        if not arguments.json:
            print(piece.text, end="", flush=True)
    assert answer.statistics is not None
    if arguments.json:
        write_json(
            {"text": answer.text, "finish_reason": answer.finish_reason}
            | {"mode": "chat" if chat else "completion"}
            | answer.statistics.as_dict()
        )
        return
    print()
    if not arguments.no_stats:
        print(statistics_line(answer.statistics), file=sys.stderr)
