"""What a manifest says of the model: what a runtime needs of it, whatever its family.

Version 3 says it by memory and caches. Versions 1 and 2 had one family and its `beta`; what they
say is read here as version 3 would put it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from edge_memllm.artifact.strict_json import exact_fields
from edge_memllm.checked_values import Fields, is_number
from edge_memllm.errors import ArtifactError

# Generous, yet small enough that no size computed from them costs much memory before it is checked.
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 24
MAX_WIDTH = 1 << 17
MAX_LAYERS = 1024
MEMORY_KINDS = ("none", "added", "gate")

_IDENTITY = re.compile(r"sha256:[0-9a-f]{64}")
_ARCHITECTURE = re.compile(r"[a-z0-9_]{1,64}")
_DETAIL = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DETAIL_TEXT = re.compile(r"[ -~]{0,200}")
_MOST_DETAILS, _MOST_DETAIL = 32, 1e15
_MOST_GAIN = 1e6
_ROLLING, _READERS = "rolling", "readers"
_DENSE_BETA = 8  # of the one family of versions 1 and 2: its networks without memory

Detail = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class MemorySpec:
    """The rows of a token: how many, how wide, and how they enter the network."""

    layers: int = 0  # one per layer, one that all layers share, or none
    width: int = 0
    kind: str = "none"  # "added" to the residual stream; or the "gate" of something computed
    gain: tuple[float, ...] = ()  # factor of every layer's rows, where there are any


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Keys and values that a layer stores; layers that read another's have none of their own."""

    layer: int
    kv_heads: int
    head_dim: int  # in the graph
    window: int | None = None  # how many positions are looked at, with a token's own; None: all
    rolling: bool = False  # only about a window of positions is kept
    readers: tuple[int, ...] = ()  # later layers that have none of their own and read these


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of the model, in Hugging Face names, and its identity."""

    identity: str  # "sha256:<64 hex digits>" of the checkpoint's configuration and weights
    architecture: str  # the family
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    memory: MemorySpec
    caches: tuple[CacheSpec, ...]
    details: Mapping[str, Detail] = field(default_factory=dict)  # what only the family knows of


def cache_values(caches: Iterable[CacheSpec]) -> int:
    """Return how many numbers the keys and values of one position are in these caches."""
    return sum(2 * cache.kv_heads * cache.head_dim for cache in caches)


def field_names(spec: type) -> tuple[str, ...]:
    """Return the keys of a part of a manifest."""
    return tuple(each.name for each in fields(spec))


def parse_model(value: object, where: str) -> ModelSpec:
    """Parse and check what version 3 says; raises `ArtifactError` naming `where`."""
    model = exact_fields(value, where, field_names(ModelSpec))
    spec = ModelSpec(
        **_common(model),
        architecture=model.text("architecture", _ARCHITECTURE, "a word of a-z, 0-9 and _"),
        memory=_parse_memory(model.value("memory"), f"{where}: memory"),
        caches=_parse_caches(model, where),
        details=_parse_details(model.mapping("details"), f"{where}: details"),
    )
    _check_memory(spec, f"{where}: memory")
    _check_caches(spec, where)
    return spec


def parse_earlier_model(value: object, where: str) -> ModelSpec:
    """Parse and check what version 2 says; raises `ArtifactError` naming `where`."""
    replaced = {"architecture", "memory", "caches", "details"}
    added = ("beta", "num_key_value_heads", "head_dim", "memory_gain", "memory_layers")
    names = [name for name in field_names(ModelSpec) if name not in replaced]
    model = exact_fields(value, where, (*names, *added))
    common = _common(model)
    beta = model.integer("beta", 0, _DENSE_BETA)
    gain = model.numbers("memory_gain", -_MOST_GAIN, _MOST_GAIN)
    rows = model.integer("memory_layers", 0, MAX_LAYERS)
    layers, width = common["num_hidden_layers"], common["hidden_size"]
    counts = (0,) if beta == _DENSE_BETA else (layers, 1)
    if rows not in counts:
        raise ArtifactError(
            f"{where}: memory_layers is {rows}, expected {' or '.join(map(str, counts))} for beta "
            f"{beta}."
        )
    _expect_gains(gain, layers, f"{where}: memory_gain")
    heads = model.integer("num_key_value_heads", 1, MAX_WIDTH)
    head_dim = model.integer("head_dim", 1, MAX_WIDTH)
    spec = ModelSpec(
        **common,
        architecture="memoryllm",
        memory=MemorySpec(rows, width, "added", gain) if rows else MemorySpec(),
        caches=tuple(CacheSpec(layer, heads, head_dim) for layer in range(layers)),
        details={"beta": beta, "feed_forward_parameters": layers * beta * width**2},
    )
    _check_caches(spec, where)
    return spec


def _common(model: Fields) -> dict[str, Any]:
    vocab_size = model.integer("vocab_size", 1, MAX_VOCABULARY)
    return {
        "identity": model.text("identity", _IDENTITY, "'sha256:' and 64 hex digits"),
        "hidden_size": model.integer("hidden_size", 1, MAX_WIDTH),
        "num_hidden_layers": model.integer("num_hidden_layers", 1, MAX_LAYERS),
        "num_attention_heads": model.integer("num_attention_heads", 1, MAX_WIDTH),
        "vocab_size": vocab_size,
        "max_position_embeddings": model.integer("max_position_embeddings", 1, MAX_POSITIONS),
        "bos_token_id": model.optional_integer("bos_token_id", 0, vocab_size - 1),
        "eos_token_ids": model.integers("eos_token_ids", 0, vocab_size - 1),
    }


def _parse_memory(value: object, where: str) -> MemorySpec:
    memory = exact_fields(value, where, field_names(MemorySpec))
    return MemorySpec(
        layers=memory.integer("layers", 0, MAX_LAYERS),
        width=memory.integer("width", 0, MAX_WIDTH),
        kind=memory.choice("kind", MEMORY_KINDS),
        gain=memory.numbers("gain", -_MOST_GAIN, _MOST_GAIN),
    )


def _parse_caches(model: Fields, where: str) -> tuple[CacheSpec, ...]:
    caches = []
    for number, item in enumerate(model.optional_items("caches", MAX_LAYERS) or ()):
        place = f"{where}: caches: {number}"
        # The first of version 3 kept all positions, for one layer each, and left that unsaid.
        item = {_ROLLING: False, _READERS: [], **item} if isinstance(item, dict) else item
        cache = exact_fields(item, place, field_names(CacheSpec))
        rolling = cache.value(_ROLLING)
        if not isinstance(rolling, bool):
            raise ArtifactError(f"{place}: rolling is {rolling!a:.80}, expected true or false.")
        caches.append(
            CacheSpec(
                layer=cache.integer("layer", 0, MAX_LAYERS - 1),
                kv_heads=cache.integer("kv_heads", 1, MAX_WIDTH),
                head_dim=cache.integer("head_dim", 1, MAX_WIDTH),
                window=cache.optional_integer("window", 1, MAX_POSITIONS),
                rolling=rolling,
                readers=cache.integers(_READERS, 0, MAX_LAYERS - 1),
            )
        )
    return tuple(caches)


def _parse_details(details: dict[str, object], where: str) -> dict[str, Detail]:
    """What the family says of itself: a few plain values, which are only ever shown."""
    if len(details) > _MOST_DETAILS:
        raise ArtifactError(f"{where}: found {len(details)}, expected at most {_MOST_DETAILS}.")
    parsed: dict[str, Detail] = {}
    for name, value in details.items():
        if not _DETAIL.fullmatch(name):
            raise ArtifactError(f"{where}: found the name {name!a:.80}, expected a word of a-z.")
        parsed[name] = _detail(value, f"{where}: {name}")
    return parsed


def _detail(value: object, where: str) -> Detail:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and _DETAIL_TEXT.fullmatch(value):
        return value
    if is_number(value) and abs(value) <= _MOST_DETAIL:
        return value
    raise ArtifactError(
        f"{where} is {value!a:.80}, expected a number, true, false, null or a line of ASCII text."
    )


def _check_memory(model: ModelSpec, where: str) -> None:
    memory, layers = model.memory, model.num_hidden_layers
    counts = (0,) if memory.kind == "none" else (layers, 1)
    if memory.layers not in counts:
        raise ArtifactError(
            f"{where}: layers is {memory.layers}, expected {' or '.join(map(str, counts))} for "
            f"kind '{memory.kind}'."
        )
    widths = {"none": (0, 0), "added": (model.hidden_size, model.hidden_size)}
    low, high = widths.get(memory.kind, (1, MAX_WIDTH))
    if not low <= memory.width <= high:
        raise ArtifactError(
            f"{where}: width is {memory.width}, expected {low} for kind '{memory.kind}'."
        )
    _expect_gains(memory.gain, layers if memory.layers else 0, f"{where}: gain")


def _expect_gains(gain: tuple[float, ...], layers: int, where: str) -> None:
    if len(gain) != layers:
        raise ArtifactError(
            f"{where} has {len(gain)} values, expected one for each of {layers} layers."
        )


def _check_caches(model: ModelSpec, where: str) -> None:
    layers = [cache.layer for cache in model.caches]
    if not layers or layers != sorted(set(layers)) or layers[-1] >= model.num_hidden_layers:
        raise ArtifactError(
            f"{where}: caches are of the layers {layers!s:.80}, expected some of "
            f"{model.num_hidden_layers}, each once and in order."
        )
    for cache in model.caches:
        if model.num_attention_heads % cache.kv_heads:
            raise ArtifactError(
                f"{where}: num_attention_heads is {model.num_attention_heads}, expected a "
                f"multiple of the keys' and values' heads, {cache.kv_heads}."
            )
        others = [reader for each in model.caches if each != cache for reader in each.readers]
        for reader in cache.readers:
            if reader in (*layers, *others) or not cache.layer < reader < model.num_hidden_layers:
                raise ArtifactError(
                    f"{where}: caches: layer {reader} reads those of layer {cache.layer}, expected "
                    "a later layer that has none of its own and reads no others."
                )
        if cache.rolling and cache.readers:
            raise ArtifactError(
                f"{where}: caches: layer {cache.layer} is rolling, and layer {cache.readers[0]} "
                "reads it as well. Only the layer's own attention can."
            )
        positions = model.max_position_embeddings
        if cache.rolling and (cache.window is None or cache.window >= positions):
            raise ArtifactError(
                f"{where}: caches: layer {cache.layer} is rolling, which needs a window below the "
                f"{positions} of max_position_embeddings, and has {cache.window or 'none'}."
            )
