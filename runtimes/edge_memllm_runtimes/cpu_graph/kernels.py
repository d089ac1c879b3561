"""Products and attention by kernels of our own, where the processor has what they need.

They are operators of the same names in a domain of their own, beside the library's. A product also
does what stands around it in the graph: it adds up blocks of its inputs where columns want sums,
and multiplies the halves of its outputs where one is a gate. Scales and angles stay as stored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np

from edge_memllm_runtimes.cpu_graph.edited import (
    CODES,
    CONTRIB,
    EditedGraph,
    Fields,
    attribute,
    element,
    written,
)

DOMAIN = "edge_memllm"
_VERSION = 1
_PRODUCT, _ATTENTION = "MatMulNBits", "GroupQueryAttention"
_BITS, _BLOCKS = (4, 8), (16, 32, 64, 128, 256)
_LARGEST_HEAD = 512
_FEWEST = 7  # inputs of attention, without angles
_HEAD_STEP = 16  # sizes of heads are multiples
_PAST, _PRESENT = "past_key_values.", "present."
_PARTS = slice(1, 3)  # keys and values, of the inputs of attention
_TABLES = slice(7, 9)  # cosines and sines
_SILU, _GELU = 1, 2
INPUT_BITS = _COARSE, _FINE = 8, 15
_ROUNDED = 4  # the accuracy level that asks for the former
_KNOWN = {
    *("num_heads", "kv_num_heads", "do_rotary", "scale", "softcap"),
    *("local_window_size", "sliding_window_cache"),
}


def is_own(each: Fields) -> bool:
    """Whether a node is computed by a kernel of our own."""
    return each.get("domain") == DOMAIN


def take_over(graph: EditedGraph, input_bits: Collection[int]) -> None:
    """Let our kernels compute what they can, products with inputs of so many bits among it.

    Casts still stand around attention and gates.
    """
    for each in graph.nodes:
        bits = _COARSE if attribute(each, "accuracy_level") == _ROUNDED else _FINE
        if _is_product(each) and bits in input_bits:
            kept = ("K", "N", "bits", "block_size")
            _own(each, kept, input_bits=bits, group=0, copies=0, gate=0)
        elif _is_attention(graph, each):
            size = _head_size(graph, each)
            scale = attribute(each, "scale") or 1 / math.sqrt(size)
            window = attribute(each, "local_window_size") or 0
            cap = attribute(each, "softcap") or 0.0
            _own(
                each,
                ("num_heads", "kv_num_heads"),
                scale=float(scale),
                local_window_size=max(window, 0),
                sliding_window_cache=attribute(each, "sliding_window_cache") or 0,
                softcap=float(cap),
            )
    if any(map(is_own, graph.nodes)):
        graph.import_domain(DOMAIN, _VERSION)


def fuse(graph: EditedGraph) -> None:
    """Let products of ours do what stands around them; the graph has no casts any more."""
    made = {name: each for each in graph.nodes for name in each["output"] if name}
    used = Counter(name for each in graph.nodes for name in each["input"])
    used.update(each["name"] for each in graph.outputs)
    readers: dict[str, Fields] = {
        name: each for each in graph.nodes for name in each["input"] if used[name] == 1
    }
    for each in graph.nodes:
        if is_own(each) and each["op_type"] == _PRODUCT:
            _with_sums(graph, each, made)
    for each in graph.nodes:
        if each["op_type"] == "Split":
            _with_gate(graph, each, made, readers, used)
    graph.nodes = _wanted(graph)
    graph.drop_unused_constants()


def _own(each: Fields, kept: tuple[str, ...], **more: int | float) -> None:
    attributes = {name: attribute(each, name) for name in kept} | more
    each["domain"] = DOMAIN
    each["attribute"] = written(attributes)


def _is_product(each: Fields) -> bool:
    """Whether a node is a product with a matrix of 4 or 8 bits, and nothing besides."""
    return (
        each["op_type"] == _PRODUCT
        and attribute(each, "bits") in _BITS
        and attribute(each, "block_size") in _BLOCKS
        and not any(each["input"][4:])
    )


def _is_attention(graph: EditedGraph, each: Fields) -> bool:
    """Whether a node is attention over keys and values in floats."""
    inputs = each["input"]
    if each["op_type"] != _ATTENTION or each.get("domain") != CONTRIB or len(inputs) < _FEWEST:
        return False
    names = {each["name"] for each in each.get("attribute", ())}
    return (
        names <= _KNOWN
        and not any(inputs[9:])
        and all(inputs[_TABLES]) == bool(attribute(each, "do_rotary"))
        and _cache_type(graph, inputs[3]) in (CODES["float16"], CODES["float32"])
        and _head_size(graph, each) % _HEAD_STEP == 0
        and _head_size(graph, each) <= _LARGEST_HEAD
    )


def _cache(graph: EditedGraph, name: str) -> Fields:
    """The cache that a layer has, or that it reads when another layer has written to it."""
    name = name.replace(_PRESENT, _PAST)
    return next(each for each in graph.inputs if each["name"] == name)


def _cache_type(graph: EditedGraph, name: str) -> int:
    found: int = element(_cache(graph, name))["elem_type"]
    return found


def _head_size(graph: EditedGraph, each: Fields) -> int:
    *_, size = element(_cache(graph, each["input"][3]))["shape"]["dim"]
    found: int = size["dim_value"]
    return found


def _with_sums(graph: EditedGraph, each: Fields, made: dict[str, Fields]) -> None:
    """Take the inputs of a product from before their sums were put behind them."""
    joined = made.get(each["input"][0])
    if joined is None or joined["op_type"] != "Concat":
        return
    x, *sums = joined["input"]
    total = made.get(sums[0]) if sums else None
    if total is None or total["op_type"] != "ReduceSum" or set(sums) != {sums[0]}:
        return
    apart = made.get(total["input"][0])
    if apart is None or apart["op_type"] != "Reshape" or apart["input"][0] != x:
        return
    *_, group = _integers(graph, apart["input"]) or [0]
    if group > 0:
        each["input"] = [x, *each["input"][1:]]
        _set(each, group=group, copies=len(sums))


def _with_gate(
    graph: EditedGraph,
    split: Fields,
    made: dict[str, Fields],
    readers: dict[str, Fields],
    used: Counter[str],
) -> None:
    """Let the product before a split into gate and value return the one times the other."""
    product = made.get(split["input"][0])
    if product is None or not is_own(product) or used[split["input"][0]] != 1:
        return
    if len(split["output"]) != 2 or len(set(_integers(graph, split["input"]))) != 1:
        return
    gate, value = split["output"]
    last = readers.get(value)
    if last is None or last["op_type"] != "Mul":
        return
    (active,) = [name for name in last["input"] if name != value] or [""]
    kind = _activation(made, active, gate, used)
    if kind and used[active] == 1:
        product["output"], last["output"] = last["output"], [f"{last['output'][0]}/apart"]
        product["name"] = product["output"][0]
        _set(product, gate=kind)


def _activation(made: dict[str, Fields], active: str, gate: str, used: Counter[str]) -> int:
    """Return which of ours makes ``active`` of ``gate``, 0 for none."""
    last = made.get(active)
    if last is None:
        return 0
    if last["op_type"] == "FastGelu" and last["input"] == [gate] and used[gate] == 1:
        return _GELU
    if last["op_type"] == "Mul" and last["input"][0] == gate and used[gate] == 2:
        inner = made.get(last["input"][1])
        if inner is not None and inner["op_type"] == "Sigmoid" and inner["input"] == [gate]:
            return _SILU
    return 0


def _set(each: Fields, **attributes: int) -> None:
    kept = [field for field in each["attribute"] if field["name"] not in attributes]
    each["attribute"] = kept + written(attributes)


def _integers(graph: EditedGraph, names: list[str]) -> list[int]:
    """The numbers of a second input, where they are in the graph."""
    tensor = graph.tensors.get(names[1], {}) if len(names) > 1 else {}
    data: Any = tensor.get("raw_data", b"")
    if tensor.get("data_type") != CODES["int64"]:
        return []
    if not isinstance(data, bytes):
        data = graph.data[data[0] : data[1]]
    numbers: list[int] = np.frombuffer(data, "<i8").tolist()
    return numbers


def _wanted(graph: EditedGraph) -> list[Fields]:
    """The nodes that something is left to take from, in their order."""
    wanted = {each["name"] for each in graph.outputs}
    found = []
    for each in reversed(graph.nodes):
        if wanted & set(each["output"]):
            wanted.update(each["input"])
            found.append(each)
    return found[::-1]
