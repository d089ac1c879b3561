"""How each operator may be used in a graph of ours, and what comes out.

Shapes are tuples of sizes and of the letters that docs/format.md gives to inputs. A new operator of
the exporter gets a rule here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from edge_memllm.checked_values import is_integer
from edge_memllm.errors import ArtifactError
from edge_memllm_runtimes.graph_file import DATA_TYPES, Node, Tensor

Dims = tuple[int | str, ...]

CONTRIB = "com.microsoft"
CODES = {name: code for code, name in DATA_TYPES.items()}
_FLOATS = (CODES["float16"], CODES["float32"])
INT64 = CODES["int64"]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a value before anything runs."""

    data_type: int
    dims: Dims
    tensor: Tensor | None = None  # for a weight
    numbers: tuple[int, ...] | None = None  # of a small weight of integers
    window: int | None = None  # of a cache: how many positions may be looked at

    @property
    def width(self) -> int | str:
        """The last size."""
        return self.dims[-1] if self.dims else 1


class Step:
    """One node with what is known of its inputs; None for one that is left out."""

    def __init__(
        self, node: Node, name: str, inputs: Sequence[Known | None], positions: int
    ) -> None:
        self.inputs = inputs
        self.positions = positions  # that the model's context holds
        self._node = node
        self._name = name

    def refuse(self, what: str) -> NoReturn:
        """Refuse the graph for what this node is or has."""
        where = self._node.outputs[0] if self._node.outputs else ""
        refuse(f"{self._name} at {where!a:.80} {what}")

    def given(self, pattern: str) -> list[Known]:
        """Return the inputs that are there; `pattern` has a letter for each place.

        "x" is a value, "w" a weight, "n" a weight of integers that shapes are made from, "-" a
        place that is left out.
        """
        if len(self.inputs) != len(pattern):
            self.refuse(f"has {len(self.inputs)} inputs, expected {len(pattern)}")
        found = []
        for letter, known in zip(pattern, self.inputs, strict=True):
            kind = "-"
            if known is not None:
                kind = "x" if known.tensor is None else "w" if known.numbers is None else "n"
                found.append(known)
            if kind != letter:
                words = {"x": "a value", "w": "a weight", "n": "a few integers", "-": "nothing"}
                self.refuse(f"has {words[kind]} where {words[letter]} is expected")
        return found

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Return an attribute that is an integer in [low, high]."""
        value = self._node.attributes.get(name, default)
        if not is_integer(value) or not low <= value <= high:
            self.refuse(f"has {name} {value!a:.40}, expected an integer from {low} to {high}")
        return value

    def has(self, name: str) -> bool:
        """Whether an attribute is there."""
        return name in self._node.attributes

    def positive(self, name: str) -> float:
        """Return an attribute that is a number above zero."""
        value = self._node.attributes.get(name)
        if type(value) is not float or not value > 0:
            self.refuse(f"has {name} {value!a:.40}, expected a number above 0")
        return value

    def text(self, name: str, default: str, choices: Collection[str]) -> str:
        """Return an attribute that is one of a few words."""
        value = self._node.attributes.get(name, default)
        if value not in choices:
            self.refuse(f"has {name} {value!a:.40}, expected {' or '.join(choices)}")
        assert isinstance(value, str)
        return value

    def expect(self, what: str, found: object, expected: object) -> None:
        """Refuse a shape, size or type that is not the expected one."""
        if found != expected:
            self.refuse(f"has {what} {_shown(found)}, expected {_shown(expected)}")

    def expect_float(self, *values: Known) -> None:
        """Refuse values that are not of one and the same float type."""
        kinds = {known.data_type for known in values}
        if len(kinds) != 1 or not kinds <= set(_FLOATS):
            self.refuse(f"has inputs of {', '.join(sorted(map(type_name, kinds)))}")

    def count(self, dims: Iterable[int | str]) -> int:
        """Return the product of sizes that must all be numbers."""
        product = 1
        for size in dims:
            if not isinstance(size, int):
                self.refuse(f"has the variable size {size} where a number is expected")
            product *= size
        return product


Results = Sequence[Known | None]


@dataclass(frozen=True, slots=True)
class _Rule:
    """How an operator may be used, and what comes out."""

    infer: Callable[[Step], Results]
    attributes: frozenset[str]


def _gather(step: Step) -> Results:
    axis = step.integer("axis", 0, 2, default=0)
    if axis:  # one layer's memory out of all layers'
        data, index = step.given("xn")
        step.expect("an index of shape", index.dims, ())
        step.expect("values of", len(data.dims), 4)
        _expect_number(step, index, step.count(data.dims[2:3]))
        return [Known(data.data_type, (*data.dims[:2], *data.dims[3:]))]
    if step.inputs[1] is not None and step.inputs[1].tensor is not None:
        data, index = step.given("xn")  # one layer's weights of a norm, gain applied
        step.expect("an index of shape", (index.dims, len(data.dims)), ((), 2))
        _expect_number(step, index, step.count(data.dims[:1]))
        return [Known(data.data_type, data.dims[1:])]
    data, index = step.given("xx")  # the records of a step, by position
    step.expect("an index of", (index.data_type, index.dims), (INT64, ("B", "T")))
    step.expect("rows of", (len(data.dims), data.dims[0]), (2, "U"))
    return [Known(data.data_type, (*index.dims, *data.dims[1:]))]


def _expect_number(step: Step, index: Known, count: int) -> None:
    assert index.numbers is not None
    if not 0 <= index.numbers[0] < count:
        step.refuse(f"takes number {index.numbers[0]} of {count}")


def _gather_quantized(step: Step) -> Results:
    codes, index, scales = step.given("xxx")
    bits = step.integer("bits", 4, 8)
    block = step.integer("block_size", 16, 1 << 16)
    step.integer("gather_axis", 0, 0)
    step.integer("quantize_axis", 1, 1)
    step.expect("an index of", (index.data_type, index.dims), (INT64, ("B", "T")))
    step.expect("codes of", (codes.data_type, codes.dims[:1]), (CODES["uint8"], ("U",)))
    step.expect_float(scales)
    width = step.count(codes.dims[1:]) * 8 // bits
    step.expect("scales of", scales.dims, ("U", width // block))
    step.expect("codes for", width // block * block, width)
    step.expect("4 or 8 bits", bits in (4, 8), True)
    return [Known(scales.data_type, (*index.dims, width))]


def _gather_nd(step: Step) -> Results:
    data, index = step.given("xx")
    step.integer("batch_dims", 1, 1)
    step.expect("an index of", (index.data_type, index.dims), (INT64, ("B", "K", 1)))
    step.expect("values of", (len(data.dims) in (3, 4), data.dims[:2]), (True, ("B", "T")))
    return [Known(data.data_type, ("B", "K", *data.dims[2:]))]


def _unsqueeze(step: Step) -> Results:
    data, axes = step.given("xn")
    if axes.numbers == (-2,):
        step.expect("values of", len(data.dims), 3)
        return [Known(data.data_type, (*data.dims[:-1], 1, data.width))]
    step.expect("axes", axes.numbers, (-1,))
    return [Known(data.data_type, (*data.dims, 1))]


def _cast(step: Step) -> Results:
    (data,) = step.given("x")
    step.expect_float(data)
    kind = step.integer("to", min(_FLOATS), max(_FLOATS))
    step.expect("a result of floats", kind in _FLOATS, True)
    return [Known(kind, data.dims)]


def _reshape(step: Step) -> Results:
    data, shape = step.given("xn")
    assert shape.numbers is not None
    step.expect("a shape of shape", shape.dims, (len(shape.numbers),))
    dims: list[int | str] = []
    for place, size in enumerate(shape.numbers):
        if size == 0 and place >= len(data.dims):
            step.refuse("copies a size that is not there")
        dims.append(data.dims[place] if size == 0 else size)
    letters = [size for size in dims if isinstance(size, str)]
    step.expect("the sizes", letters, [size for size in data.dims if isinstance(size, str)])
    whole = step.count(size for size in data.dims if isinstance(size, int))
    given = math.prod(size for size in dims if isinstance(size, int) and size != -1)
    if -1 in dims:
        step.expect("sizes left open", dims.count(-1), 1)
        dims[dims.index(-1)] = whole // given if given else 0
    step.expect("numbers", math.prod(size for size in dims if isinstance(size, int)), whole)
    if any(isinstance(size, int) and size < 1 for size in dims):
        step.refuse(f"makes a value of {dims}")
    return [Known(data.data_type, tuple(dims))]


def _elementwise(step: Step) -> Results:
    weighed = any(known is not None and known.tensor is not None for known in step.inputs[1:])
    first, second = step.given("xw" if weighed else "xx")
    step.expect_float(first, second)
    count = max(len(first.dims), len(second.dims))
    sizes = [(1,) * (count - len(each.dims)) + each.dims for each in (first, second)]
    dims = []
    for one, other in zip(*sizes, strict=True):
        if one != other and 1 not in (one, other):
            step.refuse(f"has values of {list(first.dims)} and {list(second.dims)}")
        dims.append(other if one == 1 else one)
    return [Known(first.data_type, tuple(dims))]


def _activation(step: Step) -> Results:
    (data,) = step.given("x")
    step.expect_float(data)
    return [data]


def _split(step: Step) -> Results:
    data, parts = step.given("xn")
    step.integer("axis", -1, -1)
    assert parts.numbers is not None
    if min(parts.numbers, default=0) < 1:
        step.refuse(f"makes parts of {list(parts.numbers)}")
    step.expect("parts of", sum(parts.numbers), data.width)
    return [Known(data.data_type, (*data.dims[:-1], size)) for size in parts.numbers]


def _slice(step: Step) -> Results:
    """The one cut there is: no positions, and the first of the numbers of each."""
    data, starts, ends, axes = step.given("xnnn")
    step.expect("values of", len(data.dims), 3)
    step.expect("starts and axes", (starts.numbers, axes.numbers), ((0, 0), (1, 2)))
    step.expect("ends of", ends.dims, (2,))
    assert ends.numbers is not None
    none, width = ends.numbers
    step.expect("positions", (none, 0 < width <= step.count(data.dims[2:])), (0, True))
    return [Known(data.data_type, (*data.dims[:1], 0, width))]


def _norm(step: Step) -> Results:
    gained = step.inputs[-1] is not None and step.inputs[-1].tensor is None
    data, weight = step.given("xx" if gained else "xw")
    step.integer("axis", -1, -1)
    step.positive("epsilon")
    step.expect_float(data, weight)
    step.expect("a weight of", weight.dims, (data.width,))
    return [data]


def _centred_norm(step: Step) -> Results:
    data, weight, shift = step.given("xww")
    step.integer("axis", -1, -1)
    step.positive("epsilon")
    step.expect_float(data, weight, shift)
    for each in (weight, shift):
        step.expect("a weight of", each.dims, (data.width,))
    return [data, None, Known(CODES["float32"], (*data.dims[:-1], 1))]


def _add_norm(step: Step) -> Results:
    first, second, weight = step.given("xxw")
    step.positive("epsilon")
    step.expect_float(first, second, weight)
    step.expect("values of", second.dims, first.dims)
    step.expect("dimensions", len(first.dims), 3)
    step.expect("a weight of", weight.dims, (first.width,))
    return [first, None, None, first]


def _matrix(step: Step) -> Results:
    if step.inputs[1] is not None and step.inputs[1].tensor is None:
        return _mixture(step)
    data, weight = step.given("xw")
    step.expect_float(data, weight)
    step.expect("a matrix of", (len(weight.dims), weight.dims[:1]), (2, (data.width,)))
    return [Known(data.data_type, (*data.dims[:-1], weight.dims[-1]))]


def _mixture(step: Step) -> Results:
    """A few streams of each position, as mixed as the square before them says."""
    square, streams = step.given("xx")
    step.expect_float(square, streams)
    step.expect("streams of", len(streams.dims), 4)
    step.expect("a mixture of", square.dims, (*streams.dims[:3], streams.dims[2]))
    return [streams]


def _matrix_bits(step: Step) -> Results:
    data, codes, scales, *zeros = step.given("xwww" if len(step.inputs) == 4 else "xww")
    width, rows = (step.integer(name, 1, 1 << 31) for name in ("K", "N"))
    bits, block = step.integer("bits", 2, 8), step.integer("block_size", 16, 256)
    step.expect("accuracy_level 0 or 4", step.integer("accuracy_level", 0, 4) in (0, 4), True)
    step.expect("2, 4 or 8 bits", bits in (2, 4, 8), True)
    step.expect("blocks of a power of two", block & (block - 1), 0)
    step.expect_float(data, scales)
    blocks = -(-width // block)
    step.expect("a width of", data.width, width)
    expected = (CODES["uint8"], (rows, blocks, block * bits // 8))
    step.expect("codes of", (codes.data_type, codes.dims), expected)
    step.expect("scales of", scales.dims, (rows, blocks))
    for each in zeros:
        step.expect("zero points of", each.dims, (rows, -(-blocks * bits // 8)))
        step.expect("zero points of type", each.data_type, CODES["uint8"])
    return [Known(data.data_type, (*data.dims[:-1], rows))]


def _concat(step: Step) -> Results:
    parts = step.given("x" * len(step.inputs))
    axis = step.integer("axis", -2, -1)
    step.expect("several parts", len(parts) > 1, True)
    step.expect_float(*parts)
    first = parts[0].dims
    step.expect("values of", axis == -1 or len(first) == 4, True)  # streams, or what is last
    sizes = []
    for part in parts:
        sizes.append(step.count(part.dims[axis:][:1]))
        rest = (*first[:axis], *part.dims[axis:][:1], *first[axis:][1:])
        step.expect("parts of", part.dims, rest)
    return [Known(parts[0].data_type, (*first[:axis], sum(sizes), *first[axis:][1:]))]


def _sum(step: Step) -> Results:
    data, axes = step.given("xn")
    step.integer("keepdims", 0, 0)
    step.expect("axes", axes.numbers, (-1,))
    step.expect("values of", len(data.dims), 4)
    step.expect_float(data)
    return [Known(data.data_type, data.dims[:-1])]


def _length(step: Step) -> Results:
    data, axes = step.given("xn")
    step.integer("keepdims", 1, 1)
    step.expect("axes", axes.numbers, (-1,))
    step.expect_float(data)
    return [Known(data.data_type, (*data.dims[:-1], 1))]


def _attention(step: Step) -> Results:
    kinds = [
        "-" if known is None else "x" if known.tensor is None else "w" for known in step.inputs
    ]
    packed, quantised = kinds[1:3] == ["-", "-"], len(kinds) > 9
    tail = "---ww" if quantised else ""
    found = step.given(("x--" if packed else "xxx") + "xxxxww" + tail)
    queries, (key, value, lengths, total, cosine, sine, *scales) = (
        found[: 1 if packed else 3],
        found[1 if packed else 3 :],
    )
    heads, kv_heads = (step.integer(name, 1, 1 << 17) for name in ("num_heads", "kv_num_heads"))
    step.integer("do_rotary", 1, 1)
    step.positive("scale")
    bits = step.integer("kv_cache_bit_width", 8, 8, default=8)
    for name in ("k_quant_type", "v_quant_type"):
        step.text(name, "NONE", ("PER_CHANNEL",) if quantised else ("NONE",))
    step.expect_float(*queries, cosine, sine)
    rolling = step.integer("sliding_window_cache", 0, 1, default=0)
    cache = ("B", kv_heads, "R" if rolling else "C", key.width)
    step.expect("keys of", (key.dims, bits), (cache, 8))
    step.expect("values of", (value.dims, value.data_type), (cache, key.data_type))
    window = (
        step.integer("local_window_size", 1, 1 << 24) if step.has("local_window_size") else None
    )
    step.expect("a window of", (window, window), (key.window, value.window))
    stored = CODES["int8"] if quantised else queries[0].data_type
    step.expect("keys of type", key.data_type, stored)
    step.expect("heads in groups", heads % kv_heads, 0)
    head = step.count(cache[3:])
    widths = [heads * head, kv_heads * head, kv_heads * head]
    steps: Dims = ("T", "T", "T")
    shared = not packed and queries[1].dims[1:2] == (0,)  # keys and values of another layer
    if shared:
        steps = (queries[0].dims[1], 0, 0)
        step.expect("queries at", steps[0] in ("T", "K"), True)
        step.expect("sliding_window_cache", rolling, 0)  # which cannot be read again
    for known, size, width in zip(
        queries, steps[: len(queries)], [sum(widths)] if packed else widths, strict=True
    ):
        step.expect("queries of", known.dims, ("B", size, width))
    integer = CODES["int32"]
    step.expect("lengths of", (lengths.data_type, lengths.dims), (integer, ("B",)))
    step.expect("a length of", (total.data_type, total.dims), (integer, ()))
    for angles in (cosine, sine):
        step.expect("angles of", angles.dims, (step.positions, head // 2))
    for scale in scales:
        step.expect("steps of", (scale.data_type, scale.dims), (CODES["float32"], (widths[1],)))
    attended = Known(queries[0].data_type, (*queries[0].dims[:2], widths[0]))
    return [attended] if shared and not quantised else [attended, key, value]


def _rules() -> dict[tuple[str, str], _Rule]:
    plain = {
        "Add": _Rule(_elementwise, frozenset()),
        "Cast": _Rule(_cast, frozenset({"to"})),
        "Concat": _Rule(_concat, frozenset({"axis"})),
        "Div": _Rule(_elementwise, frozenset()),
        "Gather": _Rule(_gather, frozenset({"axis"})),
        "GatherND": _Rule(_gather_nd, frozenset({"batch_dims"})),
        "LayerNormalization": _Rule(_centred_norm, frozenset({"axis", "epsilon"})),
        "MatMul": _Rule(_matrix, frozenset()),
        "Max": _Rule(_elementwise, frozenset()),
        "Mul": _Rule(_elementwise, frozenset()),
        "ReduceL2": _Rule(_length, frozenset({"keepdims"})),
        "ReduceSum": _Rule(_sum, frozenset({"keepdims"})),
        "RMSNormalization": _Rule(_norm, frozenset({"axis", "epsilon"})),
        "Relu": _Rule(_activation, frozenset()),
        "Reshape": _Rule(_reshape, frozenset()),
        "Sigmoid": _Rule(_activation, frozenset()),
        "Slice": _Rule(_slice, frozenset()),
        "Split": _Rule(_split, frozenset({"axis"})),
        "Sub": _Rule(_elementwise, frozenset()),
        "Tanh": _Rule(_activation, frozenset()),
        "Unsqueeze": _Rule(_unsqueeze, frozenset()),
    }
    contrib = {
        "FastGelu": _Rule(_activation, frozenset()),
        "GatherBlockQuantized": _Rule(
            _gather_quantized, frozenset({"bits", "block_size", "gather_axis", "quantize_axis"})
        ),
        "GroupQueryAttention": _Rule(
            _attention,
            frozenset(
                {"num_heads", "kv_num_heads", "do_rotary", "scale"}
                | {"local_window_size", "sliding_window_cache"}
                | {"kv_cache_bit_width", "k_quant_type", "v_quant_type"}
            ),
        ),
        "MatMulNBits": _Rule(
            _matrix_bits, frozenset({"K", "N", "bits", "block_size", "accuracy_level"})
        ),
        "SkipSimplifiedLayerNormalization": _Rule(_add_norm, frozenset({"epsilon"})),
    }
    return {("", name): rule for name, rule in plain.items()} | {
        (CONTRIB, name): rule for name, rule in contrib.items()
    }


RULES = _rules()


def type_name(data_type: int) -> str:
    """Return the name of ONNX's number for a type."""
    return DATA_TYPES.get(data_type, f"type {data_type}")


def _shown(value: object) -> str:
    return f"{list(value) if isinstance(value, tuple) else value}"[:200]


def refuse(what: str) -> NoReturn:
    """Refuse the graph for what it is or has."""
    raise ArtifactError(f"not a graph of this format: {what}. Do not use this artifact.")
