"""``edge-memllm explain``: what is in a model's memory, and where in a text it matters."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm.cli.files import read_text
from edge_memllm.cli.options import add_command, add_json, layer_list, positive_int
from edge_memllm.cli.text import write_json
from edge_memllm.errors import RequestError

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands
    from edge_memllm.interpretation.explaining import Questions
    from edge_memllm.interpretation.findings import Explanation

_DESCRIPTION = """\
Look into the memory of a checkpoint or an artifact: what a token's memory does and which keys it
is made of, which tokens fire a key, which tokens have a similar memory, into what clusters the
vocabulary falls, how the layers differ, and where in a text memory matters. docs/explain.md walks
through it and defines every figure.

Keys, coefficients and the parts of a logit are in the weights: they need a checkpoint and the
export extra. An artifact answers the rest, without torch. A word means the token with a space
before it where there is one; give the space yourself, or a token's number as #12, for another."""

_EXAMPLES = """\
  edge-memllm explain checkpoint --text "The capital of France is Paris."
  edge-memllm explain checkpoint --token London --layers 0,4
  edge-memllm explain checkpoint --key 0:443 --similar London --html memory.html
  edge-memllm explain checkpoint --clusters --layer-curves --corpus valid.txt --html curves.html
  edge-memllm explain artifact --text "The river runs to the sea." --json"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "explain",
        execute,
        summary="look into the memory of a model",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a checkpoint or an exported model"
    )
    _add_questions(parser.add_argument_group("questions"))
    _add_limits(parser.add_argument_group("how much"))
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace the page in --html")
    add_json(parser)


def _add_questions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="TEXT",
        help="where in this text memory matters, token by token; may be given several times, as "
        "the next three",
    )
    group.add_argument(
        "--token",
        action="append",
        default=[],
        metavar="WORD",
        help="what a token's memory does, and the keys that make it up",
    )
    group.add_argument(
        "--key",
        action="append",
        type=_key,
        default=[],
        metavar="LAYER:KEY",
        help="which tokens fire a key, and what its value does",
    )
    group.add_argument(
        "--similar",
        action="append",
        default=[],
        metavar="WORD",
        help="tokens whose memory is the most like this one's",
    )
    group.add_argument(
        "--clusters",
        action="store_true",
        help="K-means clusters of the vocabulary in each layer, labelled and judged against "
        "shuffled labels (needs the explain extra)",
    )
    group.add_argument(
        "--layer-curves",
        action="store_true",
        help="how the layers differ; with --corpus also what each one's memory is worth",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--layers",
        action="extend",
        type=layer_list,
        metavar="LAYER[,...]",
        help="of tokens, similar tokens, clusters and curves (default: all)",
    )
    group.add_argument(
        "--keys",
        type=positive_int,
        metavar="N",
        help="show so many keys of a token in each layer (default: 4)",
    )
    group.add_argument(
        "--count", type=positive_int, metavar="N", help="tokens in each list (default: 8)"
    )
    group.add_argument(
        "--cluster-count",
        type=positive_int,
        metavar="K",
        help="so many clusters in each layer (default: each layer chooses)",
    )
    group.add_argument(
        "--corpus",
        type=Path,
        metavar="FILE",
        help="text for clusters (how frequent tokens are) and curves (what layers are worth)",
    )
    group.add_argument(
        "--task",
        type=Path,
        action="extend",
        nargs="+",
        metavar="FILE",
        help="tasks that the sweep of gains is scored on, as for eval",
    )
    group.add_argument(
        "--limit", type=positive_int, metavar="N", help="only the first N items of each task file"
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="of samples, clusters and shuffles (default: 0)"
    )
    group.add_argument("--threads", type=positive_int, metavar="N", help="threads on the CPU")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    _check(arguments)
    questions = _questions(arguments)

    from edge_memllm.cli.progress import StageBars
    from edge_memllm.interpretation.explaining import explain
    from edge_memllm.interpretation.subject import open_subject

    with open_subject(arguments.model, arguments.threads) as subject, StageBars() as bars:
        command = shlex.join(["edge-memllm", *sys.argv[1:]])
        found = explain(subject, questions, command=command, progress=bars)
    _show(arguments, found)
    return 0


def _show(arguments: argparse.Namespace, found: Explanation) -> None:
    if arguments.html is not None:
        from edge_memllm.atomic import write_whole
        from edge_memllm.interpretation.report import html_page

        write_whole(arguments.html, html_page(found))
    if arguments.json:
        write_json(found.as_dict())
        return
    from edge_memllm.cli.explain_page import page

    print(page(found))
    if arguments.html is not None:
        print(f"\npage: {arguments.html}")


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect, and a page that is there already."""
    needs = (
        ("cluster_count", ("clusters",)),
        ("corpus", ("clusters", "layer_curves")),
        ("task", ("layer_curves",)),
        ("limit", ("task",)),
        ("keys", ("token",)),
        ("count", ("token", "key", "similar")),
        ("layers", ("token", "similar", "clusters", "layer_curves")),
        ("seed", ("clusters", "layer_curves")),
        ("overwrite", ("html",)),
    )
    for name, questions in needs:
        given = getattr(arguments, name)
        left_out = given is None or given is False  # a seed of zero is given
        if not left_out and not any(getattr(arguments, each) for each in questions):
            options = " or ".join(f"--{each.replace('_', '-')}" for each in questions)
            raise RequestError(
                f"--{name.replace('_', '-')} has no effect without {options}. Leave it out, or "
                "ask for that."
            )
    if arguments.html is not None and arguments.html.exists() and not arguments.overwrite:
        raise RequestError(
            f"{arguments.html}: is there already. Choose another name, or give --overwrite."
        )


def _questions(arguments: argparse.Namespace) -> Questions:
    from edge_memllm.evaluation import read_tasks
    from edge_memllm.interpretation.explaining import Questions

    chosen = {
        "strongest": arguments.keys,
        "count": arguments.count,
        "seed": arguments.seed,
        "corpus": None if arguments.corpus is None else read_text(arguments.corpus),
    }
    return Questions(
        texts=tuple(arguments.text),
        tokens=tuple(arguments.token),
        keys=tuple(arguments.key),
        similar=tuple(arguments.similar),
        clusters=arguments.clusters,
        cluster_count=arguments.cluster_count,
        curves=arguments.layer_curves,
        tasks=tuple(read_tasks(arguments.task or (), limit=arguments.limit)),
        layers=arguments.layers and tuple(arguments.layers),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _key(text: str) -> tuple[int, int]:
    """An argparse type: a layer and a key, as ``0:443``."""
    layer, separator, key = text.partition(":")
    if not (separator and layer.isdecimal() and key.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no key of a layer, such as 0:443")
    return int(layer), int(key)
