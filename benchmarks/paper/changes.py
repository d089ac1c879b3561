"""What a network of the family may have otherwise than the paper's, in words. Needs no torch."""

from __future__ import annotations

# Field of the configuration and its value.
CHANGES = {
    ("memory_norm", "shared"): "one memory norm for all layers",
    ("memory_source", "table"): "free table: rows trained directly",
    ("memory_source", "both"): "FFN(x_0) and a free table, summed",
    ("memory_sharing", "all_layers"): "one memory for all layers",
    ("compute_placement", "parallel"): "FFN-C parallel to attention",
    ("compute_form", "linear"): "FFN-C linear",
}


def wider(factor: float) -> str:
    """Say that FFN-M has another width."""
    return f"FFN-M {factor:.3g} times as wide"


# Those that have a run of their own.
WANTED = (*CHANGES.values(), wider(2))
