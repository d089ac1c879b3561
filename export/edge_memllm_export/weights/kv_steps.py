"""Calibration of int8 keys and values: one step per channel, from what a network makes of text.

The tokens of a calibration text are made here for the matrices' calibration too.

A key is cached after the rotary embedding, which turns the pair (i, i + d/2) of a head by an angle
that depends on the position. The length of the pair bounds both at every position, so that is what
is measured; values are measured as they are.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from edge_memllm.errors import ExportError
from edge_memllm.text import TOKENIZER_FILE
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_export.architectures.architecture import StoredKV
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.graph.step import KVScales
from edge_memllm_export.texts import fitting_text

_TOKENS, _WINDOW = 8192, 1024
# Other texts reach a little further than this one; what is beyond is clipped.
_HEADROOM = 1.1
_LARGEST_CODE = 127
_SMALLEST_STEP = 1e-6  # of a channel that is zero on all of the text


def kv_scales(source: Checkpoint, text: str | None) -> list[KVScales]:
    """Steps for every cache, from the network's keys and values on the first tokens of a text.

    None takes the text that comes along, or random tokens where there is no tokenizer.
    """
    reference = source.architecture.reference()
    keys: dict[int, torch.Tensor] = {}
    values: dict[int, torch.Tensor] = {}
    stored = reference.stored()
    for number, each in enumerate(stored):
        keep_key = partial(_keep_largest_pair, keys, number, each)
        each.keys.register_forward_hook(keep_key)
        each.values.register_forward_hook(partial(_keep_largest, values, number))
    window = min(_WINDOW, source.spec.max_position_embeddings)
    tokens = text_tokens(source, text, fitting_text(), _TOKENS)
    for part in torch.tensor([tokens]).split(window, dim=1):
        reference.run(part)
    return [
        KVScales(*(_steps(largest[number], each.kv_heads) for largest in (keys, values)))
        for number, each in enumerate(stored)
    ]


def text_tokens(source: Checkpoint, text: str | None, otherwise: str, most: int) -> list[int]:
    """The first tokens of `text`, or where that is None of `otherwise`; at most `most`.

    Random tokens take the place of `otherwise` where the model has no tokenizer or not its own.
    With a `text` that is an ExportError, and so is a text without tokens.
    """
    vocabulary = source.spec.vocab_size
    file, content = source.path / TOKENIZER_FILE, source.text_file(TOKENIZER_FILE)
    ids: list[int] = []
    if content is not None:
        ids = Tokenizer(content).encode(otherwise if text is None else text)[:most]
    if ids and max(ids) < vocabulary:
        return ids
    if text is not None:
        raise ExportError(
            f"{file}: gives {len(ids)} tokens of the calibration text, the largest "
            f"{max(ids, default=None)}; expected some of the model's {vocabulary}. Give a text "
            "and the model's own tokenizer, or calibrate without a text."
        )
    return np.random.default_rng(0).integers(0, vocabulary, most).tolist()


def _keep_largest(
    found: dict[int, torch.Tensor], number: int, _: object, __: object, output: torch.Tensor
) -> None:
    """Keep the largest magnitude of each channel of [B, T, Hk * d]."""
    _keep(found, number, output.float().abs().amax((0, 1)))


def _keep_largest_pair(
    found: dict[int, torch.Tensor],
    number: int,
    stored: StoredKV,
    _: object,
    __: object,
    output: torch.Tensor,
) -> None:
    """Keep, for both channels of a rotated pair, the largest length of the pair.

    The key is [B, T, Hk * d] or, out of its norm, [B, T, Hk, d] or [B, Hk, T, d].
    """
    output = output.transpose(1, 2) if stored.heads_first else output
    halves = output.float().flatten(2).unflatten(-1, (stored.kv_heads, 2, -1))
    lengths = halves.norm(dim=-2, keepdim=True).amax((0, 1))
    _keep(found, number, lengths.expand(-1, 2, -1).flatten())


def _keep(found: dict[int, torch.Tensor], number: int, largest: torch.Tensor) -> None:
    """Keep what is larger than in the windows before."""
    found[number] = torch.maximum(found.get(number, largest), largest)


def _steps(largest: torch.Tensor, heads: int) -> np.ndarray:
    """Float32 [Hk, head_dim]: the largest magnitude, with headroom, lands on the largest code."""
    steps = largest.reshape(heads, -1).numpy() * (_HEADROOM / _LARGEST_CODE)
    return np.maximum(steps, _SMALLEST_STEP).astype(np.float32)
