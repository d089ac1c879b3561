"""What a model may hold: limits set against the estimate, refused up front if it does not fit.

What a limit leaves goes to keys and values, which refuse to grow beyond it. Reads no file and
allocates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_memllm.errors import RequestError
from edge_memllm.footprint import (
    BASE_BYTES,
    Choices,
    Item,
    cuda_items,
    memory_items,
    position_bytes,
    score_bytes,
    total,
)
from edge_memllm.manifest import Manifest

# Tensors made from Python lie in an arena that grows by powers of two, whatever the session asks.
_CUDA_ROUNDING = 2
_CUDA_ADVICE = "Raise the limit, lower prefill_chunk, or use the CPU."
_ADVICE = "Raise the limit, lower prefill_chunk, or keep repacked weights in a packed_cache."


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The estimate for one device, and what the limits leave of it."""

    items: tuple[Item, ...]  # anonymous memory of the process, without keys and values
    limit: int | None
    device_items: tuple[Item, ...]  # memory of a CUDA device, the same
    device_limit: int | None
    position_bytes: int  # keys and values of one position of one sequence
    score_bytes: int  # what attention works on per position, one sequence at a time
    kv_bytes: int | None  # what all keys and values may take; None without a limit
    arena_bytes: int | None  # what the session may take on a CUDA device

    @property
    def loaded_bytes(self) -> int:
        """What there should be right after loading, besides the interpreter and libraries."""
        return sum(item.bytes for item in self.items[1:] if item.at_load)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dict for JSON, line by line."""
        plan: dict[str, Any] = {
            "limit_bytes": self.limit,
            "estimate_bytes": total(self.items),
            "estimate": _lines(self.items),
            "kv_position_bytes": self.position_bytes,
            "score_position_bytes": self.score_bytes,
            "kv_limit_bytes": self.kv_bytes,
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
    first = Item(*_first_positions(manifest, position + scores))
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
        score_bytes=scores,
        kv_bytes=_left("memory_limit", memory_limit, host, [first], _ADVICE),
        arena_bytes=None,
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


def _first_positions(manifest: Manifest, position: int) -> tuple[str, int]:
    from edge_memllm_runtimes.kv_cache import grown_capacity

    count = grown_capacity(1, manifest.model.max_position_embeddings)
    return f"keys, values and attention of the first {count} positions", count * position


def _lines(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [{"what": item.what, "bytes": item.bytes} for item in items]
