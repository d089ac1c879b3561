"""Train a byte-level BPE tokenizer, read one, or make one of raw bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from edge_memllm.errors import ArtifactError, RecipeError
from edge_memllm.modeling.stored_weights import UnusableCheckpointError, refuse_pointer
from edge_memllm.tokenizer_file import open_tokenizer

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text round-trips. ``END_OF_TEXT`` has id 0."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise RecipeError(
            f"[tokenizer] vocab_size is {vocab_size}; a byte-level vocabulary needs more than "
            f"{len(alphabet)} (every byte and {END_OF_TEXT})."
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """One token per byte; the ids above them are named placeholders, never produced by text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise RecipeError(
            f"vocab_size is {vocab_size}; a byte vocabulary needs more than {len(alphabet)}."
        )
    names = [END_OF_TEXT, *alphabet]
    names += [f"<|unused{number}|>" for number in range(vocab_size - len(names))]
    tokenizer = _byte_level(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """A ready tokenizer.json; RecipeError for one that cannot be used."""
    try:
        refuse_pointer(path)
        return open_tokenizer(path.read_bytes(), str(path))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ArtifactError, UnusableCheckpointError) as error:
        raise RecipeError(str(error)) from error


def given_tokenizer(path: Path) -> Tokenizer:
    """A ready tokenizer.json; it must know the token that marks where documents end."""
    tokenizer = read_tokenizer(path)
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise RecipeError(f"{path}: has no {END_OF_TEXT} token to mark where documents end.")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write the files Hugging Face's AutoTokenizer expects."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
