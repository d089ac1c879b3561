"""The texts that sensitivities are measured on, as windows of tokens.

How much a matrix matters depends on the text, so three kinds come along: prose, an encyclopaedia,
and conversations behind the model's own chat template (docs/results/few-bits.md). A text that is
given takes the place of all.
"""

from __future__ import annotations

import torch

from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.text import TOKENIZER_FILE
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.texts import conversations, encyclopaedia_text, fitting_text
from edge_memllm_export.weights.kv_steps import text_tokens

_WINDOW = 512
_TOKENS = 4096  # of texts; twice as many change nothing measurable
_SHORTEST = 8  # what is left over at a text's end, if it is less


def calibration_windows(source: Checkpoint, text: str | None) -> list[torch.Tensor]:
    """Windows int64 [1, T] of a text's first tokens, or without one of those that come along.

    Raises ExportError for a text that the model cannot read; without one, a model without a
    tokenizer of its own gets random tokens.
    """
    longest = min(_WINDOW, source.spec.max_position_embeddings)
    if text is not None:
        return _windows(text_tokens(source, text, "", _TOKENS), longest)
    each = _TOKENS // 2
    prose = text_tokens(source, None, fitting_text(), each)
    articles = text_tokens(source, None, encyclopaedia_text(), each)
    return [*_windows(prose, longest), *_windows(articles, longest), *_chats(source, longest)]


def _windows(tokens: list[int], longest: int) -> list[torch.Tensor]:
    parts = torch.tensor([tokens]).split(longest, dim=1)
    return [part for part in parts if part.shape[1] >= min(_SHORTEST, len(tokens))]


def _chats(source: Checkpoint, longest: int) -> list[torch.Tensor]:
    """Conversations, where the model has a template that takes them."""
    if source.text_file(TOKENIZER_FILE) is None:
        return []
    tokenizer = Tokenizer.from_files(source.text_file, str(source.path))
    if tokenizer.chat_template is None:
        return []
    found = []
    for question, answer in conversations():
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        try:
            text = tokenizer.chat_template.render(messages, add_generation_prompt=False)
            ids = tokenizer.encode(text, special=False)[:longest]
        except (ArtifactError, RequestError):  # a template that wants something else
            return []
        if ids and max(ids) < source.spec.vocab_size:
            found.append(torch.tensor([ids]))
    return found
