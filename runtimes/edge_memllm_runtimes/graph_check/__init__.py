"""Whether a graph is one that our exporter writes: the walk through it, and a rule by operator."""

from edge_memllm_runtimes.graph_check.walk import cache_names, check_graph, reader_names

__all__ = ["cache_names", "check_graph", "reader_names"]
