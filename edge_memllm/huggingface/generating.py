"""What transformers' `generate` asks of a model, for one that keeps keys and values by itself.

Knows no files and nothing of how logits are computed.

Keys and values stay where the runtime has them. Padding on the left never reaches it: each sequence
has its own length there, while transformers counts columns, padding included.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from edge_memllm.arrays import Logits
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import RequestError
from edge_memllm.model import Model
from edge_memllm.modeling.configuration import CACHE, one_cache
from edge_memllm.runtime_protocol import KVCache

_WANTED = ("output_attentions", "output_hidden_states")
_GIVEN = ("cache_implementation", "prefill_chunk_size")


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


def reorder(cache: KVCache, sources: Sequence[int]) -> None:
    """Let sequence b hold what sequence `sources[b]` held, for every b, in place.

    A sequence that nobody needs any more is written first; what is left over are rings, in which
    places are exchanged. Raises `RequestError` where the cache cannot move what it holds.
    """
    waiting = {target: source for target, source in enumerate(sources) if target != source}
    if waiting and not cache.copies:
        raise RequestError(
            "beam search moves keys and values between sequences, which cannot be done on this "
            "device. Use num_beams=1."
        )
    while waiting:
        needed = set(waiting.values())
        free = [target for target in waiting if target not in needed]
        if free:
            for target in free:
                source = waiting.pop(target)
                cache.copy(target, source, int(cache.lengths[source]))
        else:
            _exchange(cache, waiting)


def _exchange(cache: KVCache, waiting: dict[int, int]) -> None:
    """Give one sequence of a ring what it waits for; whoever waited for it looks there now."""
    target, source = waiting.popitem()
    cache.swap(target, source)
    moved = {target: source, source: target}
    for other, place in waiting.items():
        waiting[other] = moved.get(place, place)
    for other in [each for each, place in waiting.items() if each == place]:
        del waiting[other]


class GenerationCache:
    """Keys and values of B sequences. Its memory is freed with it, or by `close`."""

    is_compileable = False
    is_linear: ClassVar[tuple[bool, ...]] = (False,)  # asked of every layer: keys and values grow

    def __init__(self, model: Model, batch: int) -> None:
        """Begin a generation of `batch` sequences. Raises `RequestError` for a closed model."""
        with ExitStack() as opened:
            opened.enter_context(model.in_use())
            feeder = Feeder(model.runtime, model.source, batch, model.prefill_chunk)
            self._feeder = opened.enter_context(feeder)
            self._finalizer = weakref.finalize(self, opened.pop_all().close)
        self._chunk = model.prefill_chunk
        self._columns = 0
        self._padding = np.zeros(batch, np.int64)
        self._fed: list[list[int]] = [[] for _ in range(batch)]

    @property
    def batch(self) -> int:
        """Number of sequences, B."""
        return self._feeder.cache.batch

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns were fed, padding included; the same for every layer."""
        return self._columns

    def append(self, tokens: Sequence[Sequence[int]], padding: Sequence[int], keep: int) -> Logits:
        """Feed T columns to every sequence; return logits [B, keep, V] of the last `keep`.

        The first `padding[b]` of the T tokens of sequence b are not fed; their logits are zeros.
        """
        width = len(tokens[0])
        if width == 1 and not any(padding):
            logits = self._feeder.decode([row[0] for row in tokens])[:, None]
            result: Logits = logits.astype(np.float32)  # a copy: the next step writes over it
        else:
            longest = int(self._feeder.cache.lengths.max()) + width - min(padding)
            self._feeder.cache.ensure(longest)  # once, not again and again for each sequence
            rows = [
                self._append_one(number, row[pads:], keep)
                for number, (row, pads) in enumerate(zip(tokens, padding, strict=True))
            ]
            result = np.stack(rows)
        self._columns += width
        self._padding += np.asarray(padding)
        for fed, row, pads in zip(self._fed, tokens, padding, strict=True):
            fed += row[pads:]
        return result

    def crop(self, max_length: int) -> None:
        """Forget the columns from `max_length` on; below zero, that many of the last ones."""
        length = self._columns + max_length if max_length < 0 else max_length
        if not 0 <= length <= self._columns:
            raise RequestError(
                f"crop to {max_length}: expected at most the {self._columns} columns that are held."
            )
        self._padding = np.minimum(self._padding, length)
        for sequence, (fed, padding) in enumerate(zip(self._fed, self._padding, strict=True)):
            del fed[length - int(padding) :]
            self._feeder.rewind(sequence, fed)
        self._columns = length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence b hold what `beam_idx[b]` held: beam search keeps some and drops others."""
        sources = beam_idx.tolist()
        reorder(self._feeder.cache, sources)
        self._padding = self._padding[sources]
        self._fed = [self._fed[source].copy() for source in sources]

    def close(self) -> None:
        """Free the memory now."""
        self._finalizer()

    def _append_one(self, sequence: int, tokens: Sequence[int], keep: int) -> Logits:
        """Feed one sequence; return logits [keep, V] of its last columns."""
        if keep == 1:
            return self._feeder.prefill(sequence, tokens)[None].copy()
        shown = min(keep, len(tokens))
        if shown < len(tokens):
            self._feeder.skip(sequence, tokens[:-shown])
        last = tokens[len(tokens) - shown :]
        parts = [
            self._feeder.score(sequence, last[start : start + self._chunk]).copy()
            for start in range(0, shown, self._chunk)
        ]
        zeros = np.zeros((keep - shown, parts[0].shape[-1]), np.float32)
        return np.concatenate([zeros, *parts])


class Generating(GenerationMixin):
    """Makes `generate` work on a class with `forward` and `config`; tensors are on the CPU."""

    main_input_name = "input_ids"
    input_modalities = ("text",)
    _is_stateful = False
    _supported_generation_modes: ClassVar[list[GenerationMode]] = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    ]
    device = torch.device("cpu")
    dtype = torch.float32

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: GenerationCache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        is_first_iteration: bool = False,
        tokenizer: object = None,
        past_key_values: GenerationCache | None = None,
    ) -> dict[str, Any]:
        """Return what `forward` takes for the next step of `generate`: only the new columns.

        `is_first_iteration` and `tokenizer` do not matter to it: `generate` hands them to every
        model. `past_key_values` is the older name of `cache`.
        """
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            CACHE: one_cache(cache, past_key_values),
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def can_generate(self) -> bool:
        """Say yes to transformers, which asks before it offers `generate`."""
        return True

    def to(self, device: torch.device | str | int) -> Self:
        """Return the model for the CPU, where its tensors are; raises `RequestError` for others."""
        wanted = torch.device(device)
        if wanted.type != "cpu":
            raise RequestError(
                f"device {wanted}: inputs and logits are on the CPU, and where the graph runs is "
                "chosen when it is loaded. Give from_pretrained device='cuda', and leave the "
                "tensors and the pipeline on the CPU."
            )
        return self

    def eval(self) -> Self:
        """Return the model: it never trains."""
        return self

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Refuse what cannot be, before any work (a hook); `forward` makes the cache."""
        asked = [name for name in _WANTED if getattr(generation_config, name, None)]
        asked += [name for name in _GIVEN if getattr(generation_config, name, None) is not None]
        if asked:
            raise RequestError(
                f"{', '.join(asked)}: not there, because attention happens inside the runtime, "
                "which keeps its own cache and prefills in chunks (prefill_chunk of "
                "from_pretrained). Leave it out."
            )
        check_length(max_cache_length, self.config.max_position_embeddings)

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        """Change nothing while decoding (a hook for mixtures of experts)."""
        return nullcontext()
