"""float32 between the operators of a graph that computes in float16.

Records, keys and values stay as they are stored: records become float32 where they come in, and
attention over float16 keys is computed by its operator as before, with casts around it.
"""

from __future__ import annotations

from edge_memllm_runtimes.cpu_graph.edited import CODES, EditedGraph, Fields, cast, element
from edge_memllm_runtimes.cpu_graph.kernels import is_own

_HALF, _FLOAT = CODES["float16"], CODES["float32"]
_PAST = "past_key_values."
_GAIN = "memory_gain"  # the one input that has the type of the computation
_ATTENTION = "GroupQueryAttention"
_QUERIES, _ANGLES = slice(0, 3), slice(7, 9)  # inputs of that operator


class _Floats:
    """One pass over the nodes, in their order."""

    def __init__(self, graph: EditedGraph) -> None:
        self._graph = graph
        self._nodes: list[Fields] = []
        self._named: dict[str, str] = {}  # values that go by another name now
        self._halves: dict[str, str] = {}  # value -> the same in float16
        self._outputs = {each["name"] for each in graph.outputs}
        stored = {each["name"] for each in graph.inputs if element(each)["elem_type"] == _HALF}
        self._half_caches = {name for name in stored if name.startswith(_PAST)}

    def run(self) -> set[str]:
        graph = self._graph
        for each in graph.inputs:
            self._take(each)
        kept: set[str] = set()  # weights that stay as they are stored
        for each in graph.nodes:
            if each["op_type"] == "Cast":
                self._dropped(each)
            elif is_own(each):
                kept.update(each["input"][1:])
                self._nodes.append(each | {"input": list(map(self._name, each["input"]))})
            elif each["op_type"] == _ATTENTION and self._half_caches:
                kept.update(each["input"][_ANGLES])
                self._attend(each)
            else:
                self._nodes.append(each | {"input": list(map(self._name, each["input"]))})
        graph.nodes = self._nodes
        for each in graph.outputs:
            if each["name"] == "logits":
                element(each)["elem_type"] = _FLOAT
        halves = {name for name, each in graph.tensors.items() if each["data_type"] == _HALF}
        return halves - kept

    def _take(self, value: Fields) -> None:
        """Make an input float32 where it comes in; keys and values stay."""
        name, kind = value["name"], element(value)
        if kind["elem_type"] != _HALF or name in self._half_caches:
            return
        if name == _GAIN:
            kind["elem_type"] = _FLOAT
            return
        self._named[name] = f"{name}/float32"
        self._nodes.append(cast(name, "float32", self._named[name]))

    def _name(self, value: str) -> str:
        return self._named.get(value, value)

    def _dropped(self, each: Fields) -> None:
        """Leave out a cast between two types of floats, which are one now."""
        (value,), (output,) = each["input"], each["output"]
        if output in self._outputs:
            self._nodes.append(cast(self._name(value), "float32", output))
        else:
            self._named[output] = self._name(value)

    def _attend(self, each: Fields) -> None:
        inputs = list(map(self._name, each["input"]))
        inputs[_QUERIES] = [self._half(name) if name else "" for name in inputs[_QUERIES]]
        attended, *present = each["output"]
        half = f"{attended}/float16"
        self._nodes.append(each | {"input": inputs, "output": [half, *present]})
        self._nodes.append(cast(half, "float32", attended))

    def _half(self, value: str) -> str:
        if value not in self._halves:
            self._halves[value] = f"{value}/float16"
            self._nodes.append(cast(value, "float16", self._halves[value]))
        return self._halves[value]


def in_floats(graph: EditedGraph) -> set[str]:
    """Let everything between operators be float32; return the weights that must become it too."""
    return _Floats(graph).run()
