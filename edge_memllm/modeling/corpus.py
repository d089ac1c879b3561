"""Text files to one memory-mapped array of token ids, and windows of it to train on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from edge_memllm.atomic import WholeFile
from edge_memllm.errors import RecipeError
from edge_memllm.modeling.recipe import DataRecipe
from edge_memllm.tokenizer_file import is_unicode, library_errors

_BATCH = 512  # documents handed to the tokenizer's threads at a time


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

    def __init__(self, path: Path, length: int, name: str = "The text") -> None:
        """Open the file; ``name`` is what a RecipeError calls a text that is shorter than that."""
        self.tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        self.length = length
        if len(self.tokens) < length:
            raise RecipeError(
                f"{name} holds {len(self.tokens)} tokens, fewer than one sequence of {length}. "
                "Give more text or a smaller [data] sequence_length."
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        window = self.tokens[number * self.length : (number + 1) * self.length]
        ids = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": ids, "labels": ids}
