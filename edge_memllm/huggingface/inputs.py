"""What a step of transformers feeds, checked: token ids and where padding is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from edge_memllm.errors import RequestError


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T columns for each of B sequences; `padding[b]` of them, the first ones, are padding."""

    tokens: list[list[int]]
    padding: list[int]

    @property
    def width(self) -> int:
        """Number of columns, T."""
        return len(self.tokens[0])

    @classmethod
    def checked(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        columns: int,
        vocab_size: int,
    ) -> Self:
        """Take `input_ids` [B, T] and the mask [B, columns + T] of all columns, fed ones first.

        Raises `RequestError` for other shapes, ids beyond the vocabulary, and padding that is not
        on the left.
        """
        if input_ids.dim() != 2 or not input_ids.numel():
            raise RequestError(
                f"input_ids has the shape {tuple(input_ids.shape)}, expected at least one token "
                "for each of one or more sequences."
            )
        padding = _padding(input_ids, attention_mask, columns)
        tokens: list[list[int]] = input_ids.tolist()
        for row, pads in zip(tokens, padding, strict=True):
            wrong = [token for token in row[pads:] if not 0 <= token < vocab_size]
            if wrong:
                raise RequestError(
                    f"input_ids holds {wrong[0]}, expected ids from 0 to {vocab_size - 1}. Use "
                    "the tokenizer that came with the model, and for padding a token it has."
                )
        return cls(tokens, padding)


def _padding(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, columns: int
) -> list[int]:
    """Return how many of the T columns of each sequence are padding."""
    batch, width = input_ids.shape
    if attention_mask is None:
        return [0] * batch
    if attention_mask.shape != (batch, columns + width):
        raise RequestError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, expected "
            f"{(batch, columns + width)}: one number for each column so far and now."
        )
    new = attention_mask[:, columns:] != 0
    padding = (~new).sum(1)
    left = torch.arange(width).expand(batch, width) >= padding[:, None]
    if bool((new != left).any()) or bool((padding == width).any()):
        raise RequestError(
            "attention_mask hides tokens that are not on the left of their sequence, or all of "
            "it. Pad on the left, tokenizer.padding_side = 'left', and give no empty prompt."
        )
    if columns and bool(padding.any()):
        raise RequestError(
            "attention_mask hides new tokens of a text that has begun: padding comes first."
        )
    counts: list[int] = padding.tolist()
    return counts


def check_length(positions: int, context: int) -> None:
    """Raise `RequestError` when a generation would need more positions than the context has."""
    if positions > context:
        raise RequestError(
            f"prompt and new tokens together need {positions} positions and the model's context "
            f"holds {context}. Shorten the prompt, or give a smaller max_new_tokens or max_length."
        )
