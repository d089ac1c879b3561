"""Text files to what is trained on: a tokenizer, one mapped array of token ids, windows of it.

Arrays of ids are kept and shared by what they were made of; a tokenizer is learned, given, or one
of bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from edge_memllm.artifact.atomic import WholeFile, not_written
from edge_memllm.errors import ArtifactError, RecipeError, StorageError
from edge_memllm.modeling.recipe import DataRecipe
from edge_memllm.modeling.stored_weights import UnusableCheckpointError, refuse_pointer
from edge_memllm.text.tokenizer_file import is_unicode, library_errors, open_tokenizer

_BATCH = 512  # documents handed to the tokenizer's threads at a time

_DIGITS = 32  # of the digest, in a file's name
_BLOCK = 4 << 20

END_OF_TEXT = "<|endoftext|>"


def documents(paths: Sequence[str], recipe: DataRecipe) -> Iterator[str]:
    """Every document of the files, in order: lines of a .jsonl, or stretches of plain text."""
    for path in paths:
        try:
            if path.endswith(".jsonl"):
                yield from _json_lines(path, recipe.text_field)
            else:
                yield from _plain_text(path, recipe.document_start)
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not UTF-8 text ({error}).") from error


def _json_lines(path: str, text_field: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)[text_field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise RecipeError(
                    f"{path}, line {number}: expected a JSON object with a {text_field!r} field "
                    f"({type(error).__name__}: {error})."
                ) from error
            if not (isinstance(document, str) and is_unicode(document)):
                raise RecipeError(
                    f"{path}, line {number}: {text_field!r} is not text that can be written as "
                    "UTF-8."
                )
            yield document


def _plain_text(path: str, document_start: str | None) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        if document_start is None:
            yield file.read()
            return
        pattern = re.compile(document_start)
        lines: list[str] = []
        for line in file:
            if lines and pattern.match(line.rstrip("\n")):
                yield "".join(lines)
                lines = []
            lines.append(line)
        if lines:
            yield "".join(lines)


def write_tokens(texts: Iterable[str], tokenizer: Tokenizer, boundary: int, file: WholeFile) -> int:
    """Encode documents, each after one ``boundary`` token, into a .npy file; the token count."""
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    file.write(_npy_header(dtype, 0))  # it says the count, so it is written again at the end
    count = 0
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH)):
        with library_errors("the tokenizer fails to encode documents"):
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ids = [token for encoding in encodings for token in (boundary, *encoding.ids)]
        count += len(ids)
        file.write(np.array(ids, dtype).data)
    file.seek(0)
    file.write(_npy_header(dtype, count))
    return count


def _npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """The header of a .npy file, which is as long for any count."""
    header = BytesIO()
    fields = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Consecutive windows of a token file: documents packed end to end, no padding."""

    def __init__(
        self, path: Path, length: int, name: str = "The text", *, boundary_first: bool = False
    ) -> None:
        """Open the file; ``name`` is what a RecipeError calls a text that is shorter than that.

        With ``boundary_first`` every window begins with the boundary token, as the file does.
        """
        self.tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        self.length = length
        self._begin = self.tokens[:1] if boundary_first else self.tokens[:0]
        self._room = length - len(self._begin)
        if len(self.tokens) < length:
            raise RecipeError(
                f"{name} holds {len(self.tokens)} tokens, fewer than one sequence of {length}. "
                "Give more text or a smaller [data] sequence_length."
            )

    def __len__(self) -> int:
        return len(self.tokens) // self._room

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        text = self.tokens[number * self._room : (number + 1) * self._room]
        window = np.concatenate([self._begin, text])
        ids = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def made_once(path: Path, make: Callable[[WholeFile], Any]) -> Path:
    """The file ``path``, written by ``make`` where it is not there yet."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with WholeFile(path) as file:
                make(file)
                file.publish()
        except (OSError, StorageError) as error:
            raise _not_written(path, error) from error
    return path


def content_key(paths: Sequence[str], *settings: Any) -> str:
    """Hex digits that stand for the contents of the files, in order, and settings as JSON."""
    contents = [[Path(path).suffix, _digest(path)] for path in paths]
    text = json.dumps([*settings, contents])
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target``, if it is not there, the same file as ``source``, or a copy of it."""
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # another disk, or one that knows no links
            target.hardlink_to(source)
            return
        with source.open("rb") as file:
            made_once(target, lambda copy: copy_into(copy, file))
    except OSError as error:
        raise _not_written(target, error) from error


def copy_into(copy: WholeFile, file: BinaryIO) -> None:
    """Write all that is left of an open file."""
    while block := file.read(_BLOCK):
        copy.write(block)


def _not_written(path: Path, error: OSError | StorageError) -> RecipeError:
    if isinstance(error, OSError):
        error = not_written(path, error)
    return RecipeError(str(error))


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error


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
