"""What a checkpoint says of text: tokenizer, chat template, generation. Judged before any work.

What could never be loaded is refused, by file and field; what is not carried over is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from edge_memllm.artifact.strict_json import parse_json_object
from edge_memllm.errors import ArtifactError, ExportError, RequestError
from edge_memllm.sampling import Sampling
from edge_memllm.text import (
    CONFIG_FILE,
    GENERATION_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
)
from edge_memllm.text.tokenization import MAX_CONFIG_BYTES, Tokenizer
from edge_memllm_export.checkpoint import Checkpoint

# Files of chat templates that have no place in an artifact.
_OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates")
# What a generation configuration may say that an artifact follows, or that changes no text.
_FOLLOWED = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
_OF_NO_TEXT = {
    *("transformers_version", "use_cache", "cache_implementation", "cache_config"),
    *("max_cache_len", "return_dict_in_generate", "compile_config", "disable_compile"),
    *("continuous_batching_config", "low_memory", "prefill_chunk_size", "use_mtp"),
    *("speculation_type", "is_assistant", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
    *("target_lookbehind", "remove_invalid_values"),
}
_OF_NO_TEXT_EITHER = ("_", "output_", "assistant_", "num_assistant_")
# How the turn of a model ends, in the words of those that are about.
_TURN_ENDS = {
    *("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>"),
    *("<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
}


def check_text_files(source: Checkpoint) -> tuple[str, ...]:
    """Return what is to be known of the files, in sentences; ExportError where they are no good."""
    generation = _generation(source)
    tokenizer = None
    try:
        if source.text_file(TOKENIZER_FILE) is not None:
            tokenizer = Tokenizer.from_files(source.text_file, str(source.path))
        if tokenizer is not None and tokenizer.chat_template is not None:
            tokenizer.chat_template.check()
    except ArtifactError as error:
        raise ExportError(f"{source.path}: {error}") from error
    found = [*_not_followed(generation), *_not_carried(source.path)]
    if tokenizer is not None:
        found += _unknown_ends(source, tokenizer)
    return tuple(found)


def _generation(source: Checkpoint) -> dict[str, Any]:
    """The generation configuration, one that can be loaded; empty if there is none."""
    path, content = source.path / GENERATION_FILE, source.text_file(GENERATION_FILE)
    if content is None:
        return {}
    try:
        fields: dict[str, Any] = parse_json_object(content, str(path), MAX_CONFIG_BYTES)
        Sampling.from_generation_config(fields)
    except RequestError as error:
        raise ExportError(f"{path}: {error} Correct it and export again.") from error
    except ArtifactError as error:
        raise ExportError(str(error)) from error
    return fields


def _not_followed(generation: dict[str, Any]) -> Iterator[str]:
    general: Any = getattr(GenerationConfig, "_get_default_generation_params", dict)
    defaults: dict[str, Any] = {**GenerationConfig().to_dict(), **general()}
    names = [
        name
        for name, value in generation.items()
        if name not in _FOLLOWED | _OF_NO_TEXT
        and not name.startswith(_OF_NO_TEXT_EITHER)
        and value is not None
        and value != defaults.get(name)
    ]
    if names:
        yield (
            f"{GENERATION_FILE}: {', '.join(sorted(names))} "
            f"{'is' if len(names) == 1 else 'are'} not followed by an artifact."
        )


def _not_carried(folder: Path) -> Iterator[str]:
    for name in _OTHER_TEMPLATES:
        if (folder / name).exists():
            yield f"{name}: not carried over; an artifact's chat template is {TEMPLATE_FILE}."


def _unknown_ends(source: Checkpoint, tokenizer: Tokenizer) -> Iterator[str]:
    """What ends a text to the tokenizer or the template, but not to the model's configuration."""
    ends, vocabulary = source.spec.eos_token_ids, source.spec.vocab_size
    named = tokenizer.named_tokens.get("eos_token")
    template = tokenizer.chat_template
    text = "" if template is None else template.source or ""
    spellings = {end for end in _TURN_ENDS if end in text} | ({named} if named else set())
    for spelling in sorted(spellings):
        token = tokenizer.token(spelling)
        if token is not None and token < vocabulary and token not in ends:
            where = CONFIG_FILE if spelling == named else "the chat template"
            yield (
                f"{where}: token {token}, {spelling}, ends a text there and not in "
                f"{GENERATION_FILE} or config.json, so replies will not end at it. Add it to "
                "eos_token_id, or give it as a stop token."
            )
