"""Whether a graph is one that our exporter writes: the walk through it, and a rule by operator."""

from edge_memllm_runtimes.graph_check.walk import check_graph

__all__ = ["check_graph"]
