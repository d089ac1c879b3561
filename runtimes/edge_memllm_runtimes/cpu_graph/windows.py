"""Layers that read another's keys and values through a window attend to what they look at, no more.

A window hides what lies before it and saves no work: the operator multiplies with every position it
is given. Rolling caches keep a window only, but not of what other layers read, for these may want
positions of a whole chunk. So a step cuts once what its wanted positions look at, and all readers
share that. Keys and values in int8 are not cut, for what reads them writes them too.
"""

from __future__ import annotations

from edge_memllm_runtimes.cpu_graph.edited import EditedGraph, Fields, attribute, cast, node
from edge_memllm_runtimes.cpu_graph.kernels import is_own

_KEYS, _LENGTHS, _ANGLES = slice(3, 5), slice(5, 7), slice(7, 9)  # inputs of attention
_PRESENT = "present."


def cut_windows(graph: EditedGraph) -> None:
    """Cut keys, values and angles once for all that read them through one window."""
    cuts: dict[tuple[str, int], _Cut] = {}
    nodes: list[Fields] = []
    for each in graph.nodes:
        window = attribute(each, "local_window_size")
        if window is not None and _reads_floats(each):
            keys = each["input"][_KEYS.start]
            if (keys, window) not in cuts:
                cuts[keys, window] = _Cut(graph, each, window)
                nodes += cuts[keys, window].nodes
            each["input"] = cuts[keys, window].read(each["input"])
        nodes.append(each)
    graph.nodes = nodes


def _reads_floats(each: Fields) -> bool:
    """Whether it is one of the library's: ours look at nothing before their window."""
    keys: str = each["input"][_KEYS.start]
    return (
        not is_own(each)
        and keys.startswith(_PRESENT)
        and attribute(each, "kv_cache_bit_width") is None
    )


class _Cut:
    """The rows from the first one that a wanted position of any sequence looks at.

    With lengths n and K wanted positions that is max(0, min(n) - K - window + 1); n is
    seqlens_k + 1.
    """

    def __init__(self, graph: EditedGraph, reader: Fields, window: int) -> None:
        self._name = f"{reader['input'][_KEYS.start]}/window.{window}"
        self.nodes: list[Fields] = []
        lengths, total = reader["input"][_LENGTHS]
        before, zero, rows = (
            graph.constant(f"{self._name}/{word}", [number])
            for word, number in (("before", window - 2), ("zero", 0), ("rows", 2))
        )
        first = self._first(lengths, before, zero)
        end = self._add(node("Unsqueeze", [self._integers(total), zero], "end"))
        self._keys = [self._slice(each, first, end, rows) for each in reader["input"][_KEYS]]
        self._angles = [self._slice(each, first, end, zero) for each in reader["input"][_ANGLES]]
        skipped = self._add(cast(first, "int32", "skipped"))
        self._lengths = [
            self._add(node("Sub", [each, skipped], f"{each}/kept")) for each in (lengths, total)
        ]

    def read(self, inputs: list[str]) -> list[str]:
        """Return the inputs of attention with the cut in the place of everything."""
        own = list(inputs)
        own[_KEYS], own[_LENGTHS], own[_ANGLES] = self._keys, self._lengths, self._angles
        return own

    def _first(self, lengths: str, before: str, zero: str) -> str:
        least = self._add(node("ReduceMin", [self._integers(lengths)], "least", keepdims=1))
        wanted = self._add(node("Shape", ["logits_index"], "wanted", start=1, end=2))
        behind = self._add(node("Sub", [least, wanted], "behind"))
        first = self._add(node("Sub", [behind, before], "looked_at"))
        return self._add(node("Max", [first, zero], "first"))

    def _integers(self, value: str) -> str:
        return self._add(cast(value, "int64", f"{value}/int64"))

    def _slice(self, value: str, first: str, end: str, axis: str) -> str:
        return self._add(node("Slice", [value, first, end, axis], f"{value}/cut"))

    def _add(self, made: Fields) -> str:
        """Add a node under the name of this cut and return what its output is called."""
        name = f"{self._name}/{made['output'][0]}"
        self.nodes.append(made | {"name": name, "output": [name]})
        return name
