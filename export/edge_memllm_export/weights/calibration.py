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
from edge_memllm_export.texts import conversations, encyclopaedia_text, fitting_text, text_windows
from edge_memllm_export.weights.kv_steps import text_tokens

# Short ones, as a pass back holds what all layers make of one; 512 choose no better codes.
_WINDOW = 128
_TOKENS = 4096  # of texts; twice as many change nothing measurable
_SHORTEST = 8  # what is left over at a text's end, if it is less


def calibration_windows(
    source: Checkpoint, text: str | None, most: int | None = None
) -> list[torch.Tensor]:
    """Windows int64 [1, T] of a text's first tokens, or without one of those that come along.

    At most ``most`` tokens, besides those of conversations; None takes enough to choose codes by.

    Raises ExportError for a text that the model cannot read; without one, a model without a
    tokenizer of its own gets random tokens.
    """
    longest = min(_WINDOW, source.spec.max_position_embeddings)
    tokenizer = None
    if source.text_file(TOKENIZER_FILE) is not None:
        tokenizer = Tokenizer.from_files(source.text_file, str(source.path))

    def windows(text: str | None, otherwise: str, most: int) -> list[torch.Tensor]:
        tokens = text_tokens(source, text, otherwise, most)
        beginning = [] if tokenizer is None else tokenizer.beginning
        parts = text_windows(tokens, longest, beginning)
        return [torch.tensor([each]) for each in parts if len(each) >= min(_SHORTEST, len(tokens))]

    if text is not None:
        return windows(text, "", most or _TOKENS)
    each = (most or _TOKENS) // 2
    found = windows(None, fitting_text(), each) + windows(None, encyclopaedia_text(), each)
    return found if tokenizer is None else found + _chats(source, tokenizer, longest)


def _chats(source: Checkpoint, tokenizer: Tokenizer, longest: int) -> list[torch.Tensor]:
    """Conversations, where the model has a template that takes them."""
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
