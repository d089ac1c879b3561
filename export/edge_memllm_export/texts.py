"""The texts that come along, and tokens of texts. Needs no torch.

One text is for fitting: matrices, keys and values are calibrated on it, and mixed precision is
planned on it. The other judges what came of that, and is fitted to by nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import ExportError, RequestError
from edge_memllm.text.long_text import long_text_tokens
from edge_memllm.text.tokenization import Tokenizer

_SHORTEST_LINE, _SHARE = 40, 0.1  # what is shorter, or less, may well be in both


def judging_text() -> str:
    """About 20 kB of public-domain English prose, that of two novels."""
    return _shipped("quality_text.txt")


def judging_prompts() -> list[str]:
    """A dozen short questions and tasks, in four languages."""
    return _shipped("prompts.txt").splitlines()


def fitting_text() -> str:
    """About 40 kB of the same kind, of ten other novels."""
    return _shipped("calibration_text.txt")


def encyclopaedia_text() -> str:
    """About 30 kB of an English encyclopaedia: whole articles, for fitting too."""
    return _shipped("encyclopaedia_text.txt")


def conversations() -> list[tuple[str, str]]:
    """Short questions and their answers, for fitting too."""
    pairs = [each.split("\n", 1) for each in _shipped("conversations.txt").strip().split("\n\n")]
    return [(question, answer) for question, answer in pairs]


def text_windows(tokens: list[int], longest: int, beginning: list[int]) -> list[list[int]]:
    """Cut the tokens of a text into windows of at most ``longest``, each with a text's beginning.

    Networks that are used to a first token such as bos_token compute other things without it.
    """
    text = tokens[len(beginning) :] if tokens[: len(beginning)] == beginning else tokens
    room = max(1, longest - len(beginning))
    return [beginning + text[start : start + room] for start in range(0, len(text), room)]


def check_separate(judging: str, fitting: Mapping[str, str]) -> None:
    """Refuse a text that is to judge what was fitted to it; ``fitting`` by what each is called.

    A text is the same where a tenth of it stands in the other, line by line.
    """
    lines = [line for line in judging.splitlines() if len(line) >= _SHORTEST_LINE]
    for name, text in fitting.items():
        known = set(text.splitlines())
        shared = sum(len(line) for line in lines if line in known)
        if text == judging or shared > _SHARE * len(judging):
            raise ExportError(
                f"quality text: it is the {name}, or has parts of it, and would judge what was "
                "fitted to it. Give another text, or leave it out."
            )


def _shipped(name: str) -> str:
    return resources.files("edge_memllm_export").joinpath(name).read_text("utf-8")


@dataclass(frozen=True)
class TableText:
    """A text that a table is stored for: what to call it, and its tokens."""

    name: str
    tokens: NDArray[np.int64]


def table_text(tokenizer: bytes | None, text: str | None, vocab_size: int, where: str) -> TableText:
    """The text, None that for fitting, by the model's own tokenizer: what tokenizer.json holds.

    Raises ExportError when there is none, or one of another model.
    """
    if tokenizer is None:
        raise ExportError(
            f"{where}: no tokenizer.json, so the tokens of the table text cannot be "
            "counted. Put the tokenizer there, or leave the text out."
        )
    try:
        found = long_text_tokens(
            Tokenizer(tokenizer), fitting_text() if text is None else text, vocab_size
        )
    except RequestError as error:
        raise ExportError(
            f"{where}: tokenizer.json is another model's: {error} Put the right one there."
        ) from error
    name = "the prose that comes along" if text is None else "the table text"
    return TableText(name, np.asarray(found, np.int64))
