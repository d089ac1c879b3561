"""What transformers' `generate` asks of a model, for one that keeps keys and values by itself.

Knows no files and nothing of how logits are computed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from edge_memllm.errors import RequestError
from edge_memllm.huggingface.cache import GenerationCache
from edge_memllm.huggingface.inputs import check_length
from edge_memllm.modeling.cache_argument import CACHE, one_cache

_WANTED = ("output_attentions", "output_hidden_states")
_GIVEN = ("cache_implementation", "prefill_chunk_size")


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
