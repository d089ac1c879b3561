"""``edge-memllm run``: text from an artifact, once or in conversation."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Annotated

from edge_memllm.cli.models import Yes, load_model
from edge_memllm.cli.options import Command, Json
from edge_memllm.cli.output import read_standard_input, styled, write_json
from edge_memllm.cli.prompt import (
    Answer,
    Conversation,
    FormOptions,
    SamplingOptions,
    chat_prompt,
    cut_note,
    has_template,
    statistics_line,
)
from edge_memllm.engine.request import Request, check_speculate
from edge_memllm.errors import RequestError
from edge_memllm.loading import LoadOptions
from edge_memllm.model import Model
from edge_memllm.options import Group, Option
from edge_memllm.sampling import check_seed
from edge_memllm.text.tokenization import check_stops

_DESCRIPTION = """\
Generate text. The model is an exported one, or a checkpoint, a GGUF file or a name of the Hugging
Face Hub: that is exported once, into the cache ('edge-memllm list' shows what is there). The prompt
comes from --prompt, from standard input when that is a pipe or a file, or from you: at a terminal a
conversation starts (/help lists what you can say there).

With a chat template in the artifact the prompt is a message and the model answers; without one,
or with --raw, the model continues the text. The text goes to stdout as it is made, one line of
statistics follows on stderr."""

_EXAMPLES = """\
  edge-memllm run artifact
  edge-memllm run checkpoint --yes --prompt "It was a dark and"
  edge-memllm run artifact --prompt "It was a dark and" --max-new-tokens 60
  edge-memllm run artifact --prompt "Dear Sir," --temperature 0.7 --top-p 0.9 --seed 7
  edge-memllm run artifact --stop "." --json < prompt.txt
  edge-memllm run artifact --speculate 8 < prompt.txt
  edge-memllm run artifact --regex "yes|no" --prompt "Is it late?" --raw"""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What may be asked of ``edge-memllm run``."""

    prompt: Annotated[str | None, Option("what to continue or answer", metavar="TEXT")] = None
    request: Annotated[Request, Group(without={"prompt": ()})]
    raw: Annotated[bool, Option("do not use the chat template")] = False
    no_stats: Annotated[bool, Option("no line of statistics")] = False
    yes: Yes = False
    json: Json = False
    form: Annotated[
        FormOptions,
        Group("form of the text", "It is kept to token by token; needs the extra serve."),
    ]
    sampling: Annotated[
        SamplingOptions,
        Group("sampling", "Left out, a value comes from the artifact's generation_config.json."),
    ]
    loading: Annotated[LoadOptions, Group("loading")]

    def request_to(self, model: Model) -> Request:
        """Return what is asked of a model, without a prompt. Raises `RequestError`."""
        asked = self.request
        if asked.seed is not None:
            check_seed(asked.seed)
        check_stops(asked.stop)
        check_speculate(asked.speculate)
        form = self.form.response_format
        return replace(asked, sampling=self.sampling.on(model.sampling), response_format=form)


def execute(options: RunOptions) -> int:
    """Run the command."""
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = read_standard_input()
    if prompt is None and options.json:
        raise RequestError("--json answers one prompt. Give it with --prompt or on stdin.")
    _ = options.form.response_format  # a file that is no schema is refused before a model is loaded
    with load_model(options.loading, yes=options.yes) as model:
        request = options.request_to(model)
        if prompt is None:
            Conversation(model, request, raw=options.raw, statistics=not options.no_stats).run()
        else:
            _answer_once(model, prompt, request, options)
    return 0


def _answer_once(model: Model, prompt: str, request: Request, options: RunOptions) -> None:
    """Generate from one prompt; the text appears as it is made, unless it goes into JSON."""
    chat = has_template(model) and not options.raw
    ids = chat_prompt(model, [{"role": "user", "content": prompt}]) if chat else prompt
    answer = Answer()
    for piece in model.pieces(replace(request, prompt=ids)):
        answer.add(piece)
        if not options.json:
            print(piece.text, end="", flush=True)
    assert answer.statistics is not None
    if options.json:
        write_json(
            {"text": answer.text, "finish_reason": answer.finish_reason}
            | {"mode": "chat" if chat else "completion"}
            | answer.statistics.as_dict()
        )
        return
    print()
    if (cut := cut_note(request, answer)) is not None:
        print(styled(cut, "aside", sys.stderr), file=sys.stderr)
    if not options.no_stats:
        print(styled(statistics_line(answer.statistics), "aside", sys.stderr), file=sys.stderr)


def interrupted(options: RunOptions) -> str:
    """Say what Ctrl-C leaves of one text."""
    if options.json:
        return "Stopped: nothing was printed. A smaller --max-new-tokens ends sooner."
    if options.request.seed is None:
        return "Stopped: the text so far is all there is. With a --seed it could be written again."
    return "Stopped: the text so far is all there is. The same command writes it again."


RUN = Command(RunOptions, execute, _DESCRIPTION, _EXAMPLES, interrupted)
