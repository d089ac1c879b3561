"""``edge-memllm layers``: which feed-forward layers of a dense model are tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from edge_memllm.cli.analysis.explain import Threads
from edge_memllm.cli.options import Command, Json
from edge_memllm.cli.output import StageBars, number, read_text, table, write_json
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.options import Option, positive_int
from edge_memllm.store.source import hub_source, look

if TYPE_CHECKING:
    from edge_memllm_export.checkpoint import Checkpoint
    from edge_memllm_export.layer_tables import Damage, LayerTables

_DESCRIPTION = """\
Say of each feed-forward layer of a dense model how much of it the token alone decides, and what it
costs to put a table there: one row for each token, the mean of what the layer gives for it in a
text. MODEL is the folder of a checkpoint, a GGUF file, or a name of the Hugging Face Hub; nothing
is trained or written. Without --data and --valid, texts that come along are used: enough to see
which layers stand out, too little for the second digit.

token share is R2 on held-out text: 1 where a layer is a table, 0 where rows say nothing. table,
dropped and alone are nats per token that a replacement of that layer costs: by the rows, by
nothing, and by what the layer gives for each token alone behind the token that begins a text. A
token that --data lacks has no row: there, as at the first position of a window, nothing is
replaced."""

_EXAMPLES = """\
  edge-memllm layers smollm
  edge-memllm layers SmolLM2-135M-Instruct.Q4_1.gguf --json > layers.json
  edge-memllm layers smollm --data wiki.txt novels.txt --valid valid.txt --data-tokens 262144"""


@dataclass(frozen=True)
class LayersOptions:
    """What may be asked of ``edge-memllm layers``."""

    model: Annotated[Path, Option("a dense model: a folder, a GGUF file or a name of the Hub")]
    _: KW_ONLY
    data: Annotated[
        tuple[Path, ...],
        Option("texts that rows are made of", "FILE", parse=Path, several="words"),
    ] = ()
    valid: Annotated[
        tuple[Path, ...],
        Option("other texts, that layers are judged on", "FILE", parse=Path, several="words"),
    ] = ()
    data_tokens: Annotated[
        int, Option("tokens of the former, at most, spread over them", parse=positive_int)
    ] = 32_768
    valid_tokens: Annotated[int, Option("tokens of the latter", parse=positive_int)] = 4096
    window: Annotated[int, Option("tokens in a window", parse=positive_int)] = 256
    threads: Threads = None
    json: Json = False


def execute(options: LayersOptions) -> int:
    """Run the command."""
    try:
        from edge_memllm_export.checkpoint import Checkpoint
        from edge_memllm_export.layer_tables import measure_layers
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error
    with StageBars() as bars, _torch_threads(options.threads):
        checkpoint = Checkpoint.open(checkpoint_path(options.model))
        learned, judged = _windows(checkpoint, options)
        network = checkpoint.architecture.reference().network
        found = measure_layers(network, learned, judged, bars)
    if options.json:
        write_json(as_dict(found, str(options.model)))
    else:
        print(page(found))
    return 0


def checkpoint_path(model: Path) -> Path:
    """Where the folder or file of a model is that somebody names, downloaded first if need be.

    Raises:
        RequestError: It is an exported artifact.
    """
    found = look(model)
    if isinstance(found, Path):
        raise RequestError(
            f"{model}: is an exported model, whose layers are in its graph already. Give the "
            "checkpoint or the GGUF file that it was made of."
        )
    named = found or hub_source(model)
    return model if named is None else named.fetch()


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _windows(checkpoint: Checkpoint, options: LayersOptions) -> tuple[Any, Any]:
    """Windows of the texts that rows are made of, and of those that judge."""
    import torch

    from edge_memllm_export.layer_tables import boundary_of, led_windows
    from edge_memllm_export.texts import (
        check_separate,
        encyclopaedia_text,
        fitting_text,
        judging_text,
    )

    data = {str(path): read_text(path) for path in options.data}
    valid = {str(path): read_text(path) for path in options.valid}
    data = data or {"prose": fitting_text(), "encyclopaedia": encyclopaedia_text()}
    valid = valid or {"other prose": judging_text()}
    for text in valid.values():
        check_separate(text, data)
    boundary = boundary_of(checkpoint)
    length = min(options.window, checkpoint.spec.max_position_embeddings)

    encode = _encoder(checkpoint)

    def cut(texts: dict[str, str], most: int) -> torch.Tensor:
        share = -(-most // len(texts))
        return torch.cat(
            [led_windows(encode, text, boundary, length, share) for text in texts.values()]
        )

    return cut(data, options.data_tokens), cut(valid, options.valid_tokens)


def _encoder(checkpoint: Checkpoint) -> Callable[[str], Sequence[int]]:
    """The model's own tokenizer, as what makes tokens of a text."""
    from edge_memllm.text import TOKENIZER_FILE
    from edge_memllm.text.long_text import long_text_tokens
    from edge_memllm.text.tokenization import Tokenizer

    if checkpoint.text_file(TOKENIZER_FILE) is None:
        raise RequestError(
            f"{checkpoint.path}: no {TOKENIZER_FILE}, so no text can be read. Put the model's own "
            "there."
        )
    tokenizer = Tokenizer.from_files(checkpoint.text_file, os.fspath(checkpoint.path))
    return lambda text: long_text_tokens(tokenizer, text, checkpoint.spec.vocab_size)


def as_dict(found: LayerTables, model: str) -> dict[str, Any]:
    """Everything as one JSON object."""
    return {"model": model, **asdict(found)}


def page(found: LayerTables) -> str:
    """Everything as people read it."""
    facts = [
        ("rows", f"{number(found.distinct)} of {number(found.fit_tokens)} tokens of text"),
        ("judged", f"{number(found.judged_tokens)} tokens in windows of {found.window}"),
        ("known", f"{found.seen:.1%} of them have rows"),
        ("loss", f"{found.loss:.4f} nats as it is"),
    ]
    head = ("layer", "token share", "of known", "table", "dropped", "alone")
    rows = [
        (
            str(each.layer),
            f"{each.token_share:.3f}",
            f"{each.seen_share:.3f}",
            *(_nats(each.damage[name]) for name in ("table", "dropped", "alone")),
        )
        for each in found.layers
    ]
    return f"{table(facts)}\n\n{table([head, *rows])}"


def _nats(damage: Damage) -> str:
    spread = "" if damage.error is None else f" ± {damage.error:.4f}"
    return f"{damage.nats:+.4f}{spread}"


LAYERS = Command(LayersOptions, execute, _DESCRIPTION, _EXAMPLES)
