"""Overlays: small files that change the memory rows of chosen tokens, on top of any table."""

from edge_memllm.overlays.file import SUFFIX, OverlayWriter, Written, open_overlay, write_overlay
from edge_memllm.overlays.overlay import Edit, Operation, Overlay, OverlaySpec, overlay_of

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
