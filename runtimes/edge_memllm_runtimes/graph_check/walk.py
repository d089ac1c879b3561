"""Whether a graph is one that our exporter writes for a manifest: its operators and its shapes.

ONNX Runtime runs what it is given: loops, operators of other libraries, constants that unfold to
any size while it loads. So a graph is worked through once without numbers, before the library sees
it: every operator must be known and used as the exporter uses it, every weight must have the shape
its operator needs, and no value may be larger than the manifest's numbers explain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from edge_memllm.errors import ArtifactError
from edge_memllm_runtimes.graph_check.rules import (
    CODES,
    CONTRIB,
    INT64,
    RULES,
    Known,
    Step,
    refuse,
    type_name,
)
from edge_memllm_runtimes.graph_file import GraphFile, Node, Tensor
from edge_memllm_runtimes.kv_cache import cache_names, reader_names

if TYPE_CHECKING:
    from edge_memllm.artifact.manifest import Manifest

_EXPORT_AGAIN = "Graph and table are from different exports; export again."
_WIRE_BITS = {"q8": 8, "q4": 4}
# Which sizes that are only known in a step may come together in one value, and how.
_VARIABLE = [(), ("B",), ("U",), ("B", "T"), ("B", "K"), ("B", "C"), ("B", "R")]
# The most of its other sizes, in widths, where neither all layers nor the vocabulary are more.
_WIDTHS = 64
# A layer takes some twenty nodes, and where all its matrices are sums, some eighty; one of Gemma 3n
# takes seventy, and ninety where they are sums of two.
_NODES = 128
# Integers that shapes are made from.
_MOST_NUMBERS = 8


def check_graph(graph: GraphFile, data: bytes, manifest: Manifest) -> None:
    """Raise `ArtifactError` unless `graph`, read from `data`, is one of the manifest's model."""
    _Check(graph, data, manifest).run()


class _Check:
    """One walk through a graph."""

    def __init__(self, graph: GraphFile, data: bytes, manifest: Manifest) -> None:
        self._graph = graph
        self._manifest = manifest
        self._data = data
        self._compute = CODES[manifest.graph.compute_dtype]
        self._values: dict[str, Known] = {}
        model = manifest.model
        self._widest = max(
            model.num_hidden_layers * max(model.hidden_size, model.memory.width),
            model.vocab_size,
            _WIDTHS * max(model.hidden_size, *(cache.head_dim for cache in model.caches)),
        )

    def run(self) -> None:
        graph, manifest = self._graph, self._manifest
        expected = {"": manifest.graph.opset, CONTRIB: 1}
        if graph.opsets != expected:
            refuse(f"its operator sets are {graph.opsets}, expected {expected}")
        most = _NODES * (manifest.model.num_hidden_layers + 1)
        if max(len(graph.nodes), len(graph.tensors)) > most:
            refuse(
                f"it has {len(graph.nodes)} nodes and {len(graph.tensors)} weights, expected at "
                f"most {most} of each for {manifest.model.num_hidden_layers} layers"
            )
        self._check_inputs()
        for tensor in graph.tensors.values():
            self._define(tensor.name, self._weight(tensor))
        for node in graph.nodes:
            self._apply(node)
        self._check_outputs()

    def _check_inputs(self) -> None:
        expected = graph_inputs(self._manifest)
        _expect_names("inputs", [each.name for each in self._graph.inputs], expected)
        for each in self._graph.inputs:
            known = expected[each.name]
            # The letters may be others, but a letter stands where one is expected.
            sizes = [size if isinstance(size, int) else "" for size in each.dims]
            wanted = [size if isinstance(size, int) else "" for size in known.dims]
            if (each.data_type, sizes) != (known.data_type, wanted):
                raise ArtifactError(
                    f"the graph's input {each.name} is {type_name(each.data_type)} "
                    f"{list(each.dims)}, the manifest says {type_name(known.data_type)} "
                    f"{list(known.dims)}. {_EXPORT_AGAIN}"
                )
            self._define(each.name, known)

    def _check_outputs(self) -> None:
        model = self._manifest.model
        expected = {"logits": Known(self._compute, ("B", "K", model.vocab_size))}
        expected |= {f"present.{name}": known for name, known in _presents(self._manifest).items()}
        _expect_names("outputs", [each.name for each in self._graph.outputs], expected)
        for name, known in expected.items():
            found = self._value(name)
            if (found.data_type, found.dims) != (known.data_type, known.dims):
                refuse(
                    f"its output {name} is {type_name(found.data_type)} {list(found.dims)}, "
                    f"expected {type_name(known.data_type)} {list(known.dims)}"
                )

    def _weight(self, tensor: Tensor) -> Known:
        numbers = None
        small = tensor.size <= _MOST_NUMBERS * 8
        if tensor.data_type == INT64 and tensor.outside is None and small:
            end = tensor.start + tensor.size
            numbers = tuple(
                int.from_bytes(self._data[place : place + 8], "little", signed=True)
                for place in range(tensor.start, end, 8)
            )
        return Known(tensor.data_type, tensor.dims, tensor, numbers)

    def _define(self, name: str, known: Known) -> None:
        if not name or name in self._values:
            refuse(f"{name!a:.80} is made twice, or has no name")
        self._values[name] = known

    def _value(self, name: str) -> Known:
        if name not in self._values:
            refuse(f"{name!a:.80} is used before it is made")
        return self._values[name]

    def _apply(self, node: Node) -> None:
        rule = RULES.get((node.domain, node.op_type))
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if rule is None:
            refuse(f"it has the operator {name!a:.80}, which no graph of ours has")
        inputs = [self._value(each) if each else None for each in node.inputs]
        step = Step(node, name, inputs, self._manifest.model.max_position_embeddings)
        if unknown := node.attributes.keys() - rule.attributes:
            step.refuse(f"has the attribute {min(unknown)!a:.80}")
        if all(known is None or known.tensor is not None for known in step.inputs):
            step.refuse("computes with weights alone")
        results = rule.infer(step)
        if len(node.outputs) != len(results):
            step.refuse(f"has {len(node.outputs)} outputs, expected {len(results)}")
        for output, known in zip(node.outputs, results, strict=True):
            if known is None:
                if output:
                    step.refuse(f"has the output {output!a:.80}, which ours leaves out")
                continue
            self._check_size(step, known)
            self._define(output, known)

    def _check_size(self, step: Step, known: Known) -> None:
        letters = tuple(size for size in known.dims if isinstance(size, str))
        size = math.prod(size for size in known.dims if isinstance(size, int))
        if letters not in _VARIABLE or size > self._widest:
            step.refuse(
                f"makes a value of {list(known.dims)}, expected at most {self._widest} numbers for "
                "each token"
            )


def graph_inputs(manifest: Manifest) -> dict[str, Known]:
    """Return type and shape of every input that docs/format.md gives a graph of this model."""
    model, table = manifest.model, manifest.table
    compute = CODES[manifest.graph.compute_dtype]
    integer, half = CODES["int32"], CODES["float16"]
    layout, cells = manifest.layout, model.memory.layers * model.memory.width
    inputs = {
        "token_index": Known(INT64, ("B", "T")),
        "embedding": Known(CODES[table.embedding_dtype], ("U", model.hidden_size)),
        "logits_index": Known(INT64, ("B", "K")),
        "seqlens_k": Known(integer, ("B",)),
        "total_sequence_length": Known(integer, ()),
    }
    if layout.wire in _WIRE_BITS:
        assert layout.group is not None  # both quantised wire forms have groups
        bits = _WIRE_BITS[layout.wire]
        inputs["memory_codes"] = Known(CODES["uint8"], ("U", cells * bits // 8))
        inputs["memory_scales"] = Known(half, ("U", cells // layout.group))
    elif layout.wire != "none":
        stored = CODES["float32"] if layout.wire == "f32" else half
        inputs["memory_rows"] = Known(stored, ("U", cells))
    if layout.wire != "none":
        inputs["memory_gain"] = Known(compute, (len(model.memory.gain),))
    caches = _caches(manifest).items()
    return inputs | {f"past_key_values.{name}": known for name, known in caches}


def _caches(manifest: Manifest) -> dict[str, Known]:
    """Type and shape of all keys and values, by `cache_names`."""
    kind = CODES[manifest.graph.kv_dtype]
    return {
        name: Known(
            kind,
            ("B", cache.kv_heads, "R" if cache.rolling else "C", cache.head_dim),
            window=cache.window,
        )
        for cache in manifest.model.caches
        for name in cache_names(cache)
    }


def _presents(manifest: Manifest) -> dict[str, Known]:
    """The same of what is written: int8 ones anew by every layer that reads them."""
    written = dict(_caches(manifest))
    if manifest.graph.kv_dtype == "int8":
        for cache in manifest.model.caches:
            known = written[cache_names(cache)[0]]
            written |= dict.fromkeys(reader_names(cache), known)
    return written


def _expect_names(what: str, found: Sequence[str], expected: Iterable[str]) -> None:
    extra, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if extra or missing:
        lists = [
            f"{word} {', '.join(names)}"
            for word, names in (("unexpected", extra), ("missing", missing))
            if names
        ]
        raise ArtifactError(f"the graph's {what} differ: {'; '.join(lists):.400}. {_EXPORT_AGAIN}")
    if len(set(found)) != len(found):
        refuse(f"it has {what} of the same name")
