"""Overlays: small files that change the memory rows of chosen tokens, on top of any table."""

from edge_memllm.overlays.columns import overlay_of
from edge_memllm.overlays.header import SUFFIX
from edge_memllm.overlays.overlay import Edit, Operation, Overlay, OverlaySpec
from edge_memllm.overlays.reading import open_overlay
from edge_memllm.overlays.writing import OverlayWriter, Written, write_overlay

__all__ = [
    "SUFFIX",
    "Edit",
    "Operation",
    "Overlay",
    "OverlaySpec",
    "OverlayWriter",
    "Written",
    "open_overlay",
    "overlay_of",
    "write_overlay",
]
