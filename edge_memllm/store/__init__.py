"""Models by name: what is no artifact is exported once, and kept in the user's cache.

Knows checkpoints and GGUF files by their names and first bytes; what is in them is the exporter's
business, which is imported when something is to be exported.
"""

from edge_memllm.store.exporting import ExportPlan, artifact_of, refuse
from edge_memllm.store.store import Entry, Store, home_folder

__all__ = ["Entry", "ExportPlan", "Store", "artifact_of", "home_folder", "refuse"]
