"""What a model may hold: limits set against the estimate, refused up front if it does not fit.

What a limit leaves goes to keys and values, which refuse to grow beyond it. Reads no file and
allocates nothing.

Sizes are exact where the manifest states them; the rest is an estimate, with factors measured on
ONNX Runtime's CPU provider. Counted is anonymous memory, which a system cannot take back: pages of
mapped files are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_memllm.artifact.layout import CHECKSUM_BYTES
from edge_memllm.artifact.manifest import QUANTISED_WEIGHTS, Manifest
from edge_memllm.artifact.model_spec import cache_values
from edge_memllm.codecs import EMBEDDING_DTYPES
from edge_memllm.engine.feeding import PREFILL_CHUNKS
from edge_memllm.errors import RequestError
from edge_memllm.text import TOKENIZER_FILE, VOCABULARY_FILE

# Measured with ONNX Runtime 1.31 on a CPU; docs/results/speed.md has the figures.
# The interpreter with all libraries and an open session, no model:
BASE_BYTES = 40_000_000
# Of a tokenizer in the library, once what it has freed is given back: a sum and bytes per token,
# above all that were measured, of 8,192 to 262,145. With a vocabulary file: besides the file.
_LIBRARY_TOKENIZER = (3_000_000, 400)
_READ_TOKENIZER = 6_000_000
# Bytes per byte of graph, by how its weights are stored and where they are read from. Low-bit
# matrices are repacked, so the packed copy stays; reading them from the graph file itself leaves
# a rest behind. Float16 ones become float32 where the processor computes in that, float32 ones
# stay as they are read. Those of 2 bits are measured with 1.32 in blocks of 32, whose scales and
# sums become float32 and are most of the copy: 2.01 and 0.28, in blocks of 128 1.22 and less. Mixed
# graphs hold such matrices at most: 1.54 where most have 2 bits, 1.27 where a file's Q4_0 is kept.
_GRAPH_FACTORS = {
    "inside": {"mixed": 2.3, "int2": 2.3, "int4": 1.9, "int8": 2.0, "fp16": 3.3, "fp32": 1.1},
    "beside": {"mixed": 2.05, "int2": 2.05, "int4": 1.65, "int8": 1.6, "fp16": 2.2, "fp32": 1.1},
    "packed": {"mixed": 0.3, "int2": 0.3, "int4": 0.3, "int8": 0.3},
}
# The most there is while a session is made: the stored bytes, what the library reads of them and
# what it makes of that are there at once.
_LOADING_FACTORS = {
    "inside": {"mixed": 4.0, "int2": 4.0, "int4": 3.7, "int8": 3.7, "fp16": 4.8, "fp32": 3.5},
    "beside": {"mixed": 3.6, "int2": 3.6, "int4": 3.3, "int8": 3.3, "fp16": 4.5, "fp32": 2.2},
    "packed": {"mixed": 2.1, "int2": 2.1, "int4": 2.1, "int8": 2.1},
}
_GRAPH_WORDS = {
    "inside": "graph: {} weights repacked",
    "beside": "graph: {} weights repacked",
    "packed": "graph: {} weights mapped from the packed cache, what is left of them",
}
# Graphs from here on are kept packed unless that is refused: below, it is not worth the disk.
_PACKED_FROM = 64_000_000
_PACKED_DISK = 2.4
# What a step works on besides the rows of all layers, in values per token and unit of width:
# activations of one layer and what the library's arena keeps of them.
_WORK_FACTOR = 60
# What attention works on, in bytes per head, token of a step and position before it: a float32
# score, twice, for the arena that holds them grows by powers of two.
_SCORE_BYTES = 8
# A value of int8 keys or values in float32, twice for the same reason.
_WIDE_BYTES = 8
_STAGING_BUFFERS = 2  # the next chunk is read while this one is computed
# On CUDA, not measured: libraries for matrix products, and what they work in.
_CUDA_LIBRARY_BYTES = 64_000_000

# Tensors made from Python lie in an arena that grows by powers of two, whatever the session asks.
_CUDA_ROUNDING = 2
_CUDA_ADVICE = "Raise the limit, lower prefill_chunk, or use the CPU."
_ADVICE = "Raise the limit, lower prefill_chunk, or have repacked weights kept (packed_cache)."


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the arithmetic."""

    what: str
    bytes: int
    at_load: bool = True  # there right after loading, or only when a text is worked on


@dataclass(frozen=True, slots=True)
class Choices:
    """What is chosen when loading, as far as memory depends on it."""

    prefill_chunk: int = PREFILL_CHUNKS["cpu"]
    record_cache: int = 0
    reader: str = "pread"
    packed: bool = False
    overlay_cache: int = 0


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes, for one sequence of ``tokens`` tokens."""

    tokens: int
    disk_bytes: int
    graph_bytes: int
    table_bytes: int
    record_bytes: int
    kv_bytes: int
    resident_bytes: int  # table read from storage
    resident_bytes_with_table: int  # table in memory (--reader ram)


def footprint(manifest: Manifest, tokens: int, choices: Choices | None = None) -> Footprint:
    """Estimate for one sequence of ``tokens`` tokens, at most the model's context, on a CPU.

    Without `choices`, of a model that is loaded with no options.
    """
    from edge_memllm_runtimes.kv_cache import grown_capacity

    capacity = grown_capacity(tokens, manifest.model.max_position_embeddings)
    kv_bytes = window_bytes(manifest) + capacity * position_bytes(manifest)
    chosen = choices or Choices(packed=packs_by_itself(manifest))
    scores = capacity * score_bytes(manifest, chosen.prefill_chunk)
    resident = total(memory_items(manifest, chosen)) + kv_bytes + scores
    return Footprint(
        tokens=tokens,
        disk_bytes=sum(spec.bytes for spec in manifest.files.values()),
        graph_bytes=graph_file_bytes(manifest),
        table_bytes=manifest.files[manifest.table.file].bytes,
        record_bytes=manifest.table.record_bytes,
        kv_bytes=kv_bytes,
        resident_bytes=resident,
        resident_bytes_with_table=resident + _records_bytes(manifest),
    )


def memory_items(
    manifest: Manifest, choices: Choices, base_bytes: int = BASE_BYTES, *, graph: bool = True
) -> list[Item]:
    """Everything a loaded model holds in memory but keys and values, line by line.

    `base_bytes` is what the process has without a model. Without `graph`, that and what it works
    on lie elsewhere, on a device.
    """
    vocabulary = manifest.model.vocab_size
    places = manifest.layout.offsets_bytes(vocabulary)
    records = min(choices.prefill_chunk, vocabulary)
    staging = _STAGING_BUFFERS * records * manifest.layout.buffer_bytes
    work = choices.prefill_chunk * _work_bytes(manifest, "cpu")
    items = [
        Item("interpreter and libraries", base_bytes),
        *([_graph_item(manifest, packed=choices.packed)] if graph else []),
        Item("tokenizer", tokenizer_bytes(manifest)),
        Item("checksums of the table's records", vocabulary * CHECKSUM_BYTES),
        Item("places of the table's records", places),
        Item("parameters of the table's codec, widened", 2 * manifest.layout.parameters_bytes),
        Item("table in memory", _records_bytes(manifest) if choices.reader == "ram" else 0),
        Item("record cache", choices.record_cache, at_load=False),
        Item("rows changed by overlays", choices.overlay_cache, at_load=False),
        Item(f"records of {_STAGING_BUFFERS} x {records} tokens of a prompt", staging, False),
        Item(f"work on {choices.prefill_chunk} tokens of a prompt", work if graph else 0, False),
    ]
    return [item for item in items if item.bytes]


def cuda_items(manifest: Manifest, prefill_chunk: int) -> list[Item]:
    """What a model holds on a CUDA device but keys and values. Nothing of it is measured."""
    model = manifest.model
    several = model.vocab_size * model.hidden_size * 2 if manifest.graph.weights != "fp16" else 0
    items = [
        Item(f"graph: {manifest.graph.weights} weights", graph_file_bytes(manifest)),
        Item("the largest matrix in float16, when several tokens go through it", several),
        Item(
            f"work on {prefill_chunk} tokens of a prompt",
            prefill_chunk * _work_bytes(manifest, "cuda"),
        ),
        Item("libraries", _CUDA_LIBRARY_BYTES),
    ]
    return [item for item in items if item.bytes]


def total(items: Iterable[Item]) -> int:
    """Sum of all lines."""
    return sum(item.bytes for item in items)


def position_bytes(manifest: Manifest) -> int:
    """Bytes of keys and values of one position of one sequence, where all positions are kept."""
    return _kv_bytes(manifest, 1) - _kv_bytes(manifest, 0)


def window_bytes(manifest: Manifest, device: str = "cpu") -> int:
    """Bytes of keys and values of one sequence in layers that keep a window only."""
    return _kv_bytes(manifest, 0, device)


def score_bytes(manifest: Manifest, prefill_chunk: int) -> int:
    """Bytes that attention works on per position, one sequence at a time, in a step of a chunk."""
    scores = manifest.model.num_attention_heads * prefill_chunk * _SCORE_BYTES
    if manifest.graph.kv_dtype != "int8":
        return scores
    # Prompts are attended to in float32, one layer at a time.
    return scores + _WIDE_BYTES * max(cache_values([each]) for each in manifest.model.caches)


def packs_by_itself(manifest: Manifest) -> bool:
    """Whether weights are kept repacked, on a CPU, where nothing is said about it."""
    return (
        manifest.graph.weights in QUANTISED_WEIGHTS and graph_file_bytes(manifest) >= _PACKED_FROM
    )


def packed_disk_bytes(manifest: Manifest) -> int:
    """Bytes of disk that repacked weights take: beside them lie the stored ones."""
    return round(graph_file_bytes(manifest) * _PACKED_DISK)


def graph_file_bytes(manifest: Manifest) -> int:
    """Bytes of the graph with its external data."""
    names = (manifest.graph.file, manifest.graph.external_data)
    return sum(manifest.files[name].bytes for name in names if name is not None)


def tokenizer_bytes(manifest: Manifest) -> int:
    """Bytes that the tokenizer takes, if there is one."""
    if TOKENIZER_FILE not in manifest.files:
        return 0
    if (vocabulary := manifest.files.get(VOCABULARY_FILE)) is not None:
        return vocabulary.bytes + _READ_TOKENIZER
    fixed, each = _LIBRARY_TOKENIZER
    return fixed + each * manifest.model.vocab_size


def _kv_bytes(manifest: Manifest, capacity: int, device: str = "cpu") -> int:
    from edge_memllm_runtimes.ort_graph import GraphShape

    return GraphShape.of(manifest, device).cache_bytes(capacity)


def _graph_item(manifest: Manifest, *, packed: bool) -> Item:
    weights, form = manifest.graph.weights, _graph_form(manifest, packed=packed)
    words = _GRAPH_WORDS[form].format(weights)
    if weights in ("fp16", "fp32"):
        words = f"graph: {weights} weights"
    return Item(words, _graph_bytes(manifest, _GRAPH_FACTORS[form]))


def _graph_form(manifest: Manifest, *, packed: bool) -> str:
    return "packed" if packed else "inside" if manifest.graph.external_data is None else "beside"


def _graph_bytes(manifest: Manifest, factors: Mapping[str, float]) -> int:
    # A form that has no packed weights refuses the packed cache later, in words of its own.
    factor = factors.get(manifest.graph.weights, max(factors.values()))
    return round(graph_file_bytes(manifest) * factor)


def _loading_bytes(manifest: Manifest, items: Sequence[Item], *, packed: bool) -> int:
    """Return the most there is while a model is loaded, besides interpreter and libraries."""
    loaded = total(item for item in items[1:] if item.at_load)
    factors = _LOADING_FACTORS[_graph_form(manifest, packed=packed)]
    graph = _graph_item(manifest, packed=packed).bytes
    return loaded - graph + _graph_bytes(manifest, factors)


def _work_bytes(manifest: Manifest, device: str) -> int:
    """Bytes that a step works on, for each of its tokens: every layer's memory, and the rest."""
    model = manifest.model
    memory = len(model.memory.gain) * model.memory.width
    return (memory + _WORK_FACTOR * model.hidden_size) * _value_bytes(manifest, device)


def _records_bytes(manifest: Manifest) -> int:
    return manifest.layout.records_bytes(manifest.model.vocab_size)


def _value_bytes(manifest: Manifest, device: str) -> int:
    from edge_memllm_runtimes.cpu_graph import computed_dtype

    return EMBEDDING_DTYPES[computed_dtype(manifest, device)].itemsize


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The estimate for one device, and what the limits leave of it."""

    items: tuple[Item, ...]  # anonymous memory of the process, without keys and values
    limit: int | None
    device_items: tuple[Item, ...]  # memory of a CUDA device, the same
    device_limit: int | None
    position_bytes: int  # keys and values of one position of one sequence
    window_bytes: int  # those of one sequence in layers that keep a window only
    score_bytes: int  # what attention works on per position, one sequence at a time
    kv_bytes: int | None  # what all keys and values may take; None without a limit
    arena_bytes: int | None  # what the session may take on a CUDA device
    loading_bytes: int = 0  # the most while it is loaded, besides interpreter and libraries
    packed_cache: Path | None = None  # where repacked weights lie, if they are mapped

    @property
    def loaded_bytes(self) -> int:
        """What there should be right after loading, besides the interpreter and libraries."""
        return sum(item.bytes for item in self.items[1:] if item.at_load)

    @property
    def model_bytes(self) -> int:
        """What the model takes besides the interpreter and libraries, without keys and values."""
        return total(self.items[1:])

    def first_bytes(self, manifest: Manifest, texts: int) -> int:
        """Bytes of keys, values and attention with which so many texts side by side begin."""
        position = texts * self.position_bytes + self.score_bytes
        return _first_positions(manifest, texts * self.window_bytes, position)[1]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dict for JSON, line by line."""
        plan: dict[str, Any] = {
            "limit_bytes": self.limit,
            "estimate_bytes": total(self.items),
            "estimate": _lines(self.items),
            "kv_position_bytes": self.position_bytes,
            "kv_window_bytes": self.window_bytes,
            "score_position_bytes": self.score_bytes,
            "kv_limit_bytes": self.kv_bytes,
            "packed_cache": None if self.packed_cache is None else str(self.packed_cache),
        }
        if self.device_items:
            plan["device_limit_bytes"] = self.device_limit
            plan["device_estimate_bytes"] = total(self.device_items)
            plan["device_estimate"] = _lines(self.device_items)
        return plan


def plan_memory(
    manifest: Manifest,
    device: str,
    choices: Choices,
    *,
    memory_limit: int | None = None,
    vram_limit: int | None = None,
    base_bytes: int | None = None,
) -> MemoryPlan:
    """Estimate what the model will hold on "cpu" or "cuda", and what the limits leave.

    `base_bytes` is what the process holds already, None if the system does not tell. Raises
    `RequestError` with the arithmetic when a limit has no room for the first positions.
    """
    base = max(BASE_BYTES, base_bytes or 0)
    position = position_bytes(manifest)
    scores = score_bytes(manifest, choices.prefill_chunk) if device == "cpu" else 0
    windows = window_bytes(manifest, device)
    first = Item(*_first_positions(manifest, windows, position + scores))
    if device == "cuda":
        host = memory_items(manifest, choices, base, graph=False)
        _left("memory_limit", memory_limit, host, [], _CUDA_ADVICE)
        fixed = cuda_items(manifest, choices.prefill_chunk)
        records = choices.prefill_chunk * manifest.layout.fed_bytes * _CUDA_ROUNDING
        beside = [Item("records of a prefill step", records)]
        doubled = Item(f"{first.what}, twice: rounded up", first.bytes * _CUDA_ROUNDING)
        left = _left("vram_limit", vram_limit, [*fixed, *beside], [doubled], _CUDA_ADVICE)
        return MemoryPlan(
            items=tuple(host),
            limit=memory_limit,
            device_items=(*fixed, *beside),
            device_limit=vram_limit,
            position_bytes=position,
            window_bytes=windows,
            score_bytes=scores,
            kv_bytes=None if left is None else left // _CUDA_ROUNDING,
            arena_bytes=None if left is None else total(fixed),
        )
    host = memory_items(manifest, choices, base)
    return MemoryPlan(
        items=tuple(host),
        limit=memory_limit,
        device_items=(),
        device_limit=None,
        position_bytes=position,
        window_bytes=windows,
        score_bytes=scores,
        kv_bytes=_left("memory_limit", memory_limit, host, [first], _ADVICE),
        arena_bytes=None,
        loading_bytes=_loading_bytes(manifest, host, packed=choices.packed),
    )


def arithmetic(items: Sequence[Item]) -> str:
    """One line per item, and their sum."""
    rows = [*((f"{item.bytes:,}", item.what) for item in items), (f"{total(items):,}", "in all")]
    width = max(len(size) for size, _ in rows)
    return "\n".join(f"  {size:>{width}}  {what}" for size, what in rows)


def _left(
    name: str, limit: int | None, fixed: Sequence[Item], first: Sequence[Item], advice: str
) -> int | None:
    """Return the bytes a limit leaves beside `fixed`; refuses if `first` does not fit there."""
    if limit is None:
        return None
    if total([*fixed, *first]) > limit:
        raise RequestError(
            f"{name} is {limit:,} bytes and about {total([*fixed, *first]):,} are needed:\n"
            f"{arithmetic([*fixed, *first])}\n{advice}"
        )
    return limit - total(fixed)


def _first_positions(manifest: Manifest, windows: int, position: int) -> tuple[str, int]:
    from edge_memllm_runtimes.kv_cache import grown_capacity

    count = grown_capacity(1, manifest.model.max_position_embeddings)
    return f"keys, values and attention of the first {count} positions", windows + count * position


def _lines(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [{"what": item.what, "bytes": item.bytes} for item in items]
