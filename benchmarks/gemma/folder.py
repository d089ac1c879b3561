"""A random Gemma 4 as a folder of transformers: bfloat16 in shards, written as it is made."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gemma.shapes import Shape, config_of
from benchmarks.gemma.weights import chunks, tensor_shapes

_PREFIX = "model.language_model."
_SHARD_BYTES = 5 * 10**9
_ITEM = 2  # bytes of a bfloat16
_ALIGNMENT = 8


def write_folder(shape: Shape, seed: int, out: Path, tokenizer: Path | None = None) -> None:
    """Write the new folder `out`.

    Files of a tokenizer are copied from the folder of one; without, it has one token per byte.
    """
    out.mkdir(parents=True)
    sizes = tensor_shapes(shape)
    shards = _shards(sizes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(out / file, {name: sizes[name] for name in names}, seed)
        places |= {f"{_PREFIX}{name}": file for name in names}
    total = sum(_bytes(size) for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    (out / "config.json").write_text(json.dumps(config_of(shape), indent=1), "utf-8")
    if tokenizer is None:
        _byte_tokenizer().save(str(out / "tokenizer.json"))
    else:
        for each in tokenizer.glob("tokenizer*.json"):
            shutil.copy(each, out / each.name)


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({letter: token for token, letter in enumerate(letters)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    return found


def _shards(sizes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names in order, in groups of at most so many bytes unless one alone has more."""
    found: list[list[str]] = [[]]
    room = _SHARD_BYTES
    for name, size in sizes.items():
        if found[-1] and _bytes(size) > room:
            found.append([])
            room = _SHARD_BYTES
        found[-1].append(name)
        room -= _bytes(size)
    return found


def _write_shard(file: Path, sizes: dict[str, tuple[int, ...]], seed: int) -> None:
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + _bytes(size)
        header[_PREFIX + name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(words).to_bytes(8, "little") + words)
        for name, size in sizes.items():
            for rows in chunks(name, size, seed):
                rows.view(torch.int16).numpy().tofile(stream)


def _bytes(size: tuple[int, ...]) -> int:
    return math.prod(size) * _ITEM
