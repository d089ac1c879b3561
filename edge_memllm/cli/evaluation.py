"""``edge-memllm eval``: how well an artifact predicts text."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_memllm.cli.files import read_text
from edge_memllm.cli.options import (
    add_command,
    add_json,
    add_loading,
    loading_keywords,
    positive_int,
)
from edge_memllm.cli.text import number, table, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_memllm.cli.options import Commands
    from edge_memllm.model import Model
    from edge_memllm.perplexity import Perplexity

_DESCRIPTION = """\
Measure perplexity: the artifact predicts every token of a text from those before it, in windows
of --context tokens that advance by --stride, so that each token has at least their difference
before it. Several files count as separate texts and are summed up. Perplexity depends on the
tokenizer; bits per byte do not."""

_EXAMPLES = """\
  edge-memllm eval artifact --text valid.txt
  edge-memllm eval artifact --text wiki.txt novel.txt --context 512 --json"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "eval",
        execute,
        summary="measure perplexity on text",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an exported model")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text files"
    )
    parser.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help="tokens in a window (default: the model's whole context)",
    )
    parser.add_argument(
        "--stride", type=positive_int, metavar="N", help="tokens from window to window (half of it)"
    )
    add_json(parser)
    add_loading(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    texts = {str(path): read_text(path) for path in arguments.text}

    import edge_memllm

    with edge_memllm.load(arguments.artifact, **loading_keywords(arguments)) as model:
        parts = {
            name: _measure(model, text, arguments.context, arguments.stride)
            for name, text in texts.items()
        }
    if arguments.json:
        each = {name: part.as_dict() for name, part in parts.items()}
        write_json({**summary(list(parts.values())), "texts": each, "tasks": {}})
    else:
        print(_page(parts))
    return 0


def _measure(model: Model, text: str, context: int | None, stride: int | None) -> Perplexity:
    from edge_memllm.cli.progress import StageBars
    from edge_memllm.perplexity import measure_perplexity

    with StageBars() as bars:
        return measure_perplexity(
            model,
            text,
            context=context,
            stride=stride,
            progress=lambda done, total: bars("tokens", done, total),
        )


def summary(parts: Sequence[Perplexity]) -> dict[str, Any]:
    """Figures over all texts together: every token counts once."""
    tokens = sum(part.tokens for part in parts)
    size = sum(part.bytes for part in parts)
    total = math.fsum(part.nll_per_token * part.tokens for part in parts)
    return {
        "perplexity": math.exp(min(total / tokens, 700.0)),
        "nll_per_token": total / tokens,
        "bits_per_byte": total / max(1, size) / math.log(2),
        "tokens": tokens,
        "context": parts[0].context,
        "stride": parts[0].stride,
    }


def _page(parts: dict[str, Perplexity]) -> str:
    rows = [("text", "tokens", "perplexity", "nats per token", "bits per byte")]
    figures = {name: part.as_dict() for name, part in parts.items()}
    if len(parts) > 1:
        figures["all"] = summary(list(parts.values()))
    for name, part in figures.items():
        losses = (f"{part['nll_per_token']:.4f}", f"{part['bits_per_byte']:.4f}")
        rows.append((name, number(part["tokens"]), f"{part['perplexity']:.3f}", *losses))
    first = next(iter(parts.values()))
    return f"{table(rows)}\n\nwindows of {first.context} tokens, every {first.stride}"
