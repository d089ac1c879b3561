"""Prompts over keys and values in int8 are attended to in float32, decoding as it was.

The operator multiplies int8 keys with one query after another: quick for one new token, two to
three times slower than float32 for hundreds. So each layer gets two branches. In the one for many
tokens, new keys and values are rounded and written where the operator would have put them, and all
that is stored is attended to in float32: the same numbers, added up in another order.
"""

from __future__ import annotations

from typing import Any

from edge_memllm_runtimes.cpu_graph.edited import (
    CODES,
    CONTRIB,
    Branch,
    EditedGraph,
    Fields,
    attribute,
    either,
    node,
)

# New tokens of a step from which on the float32 branch is the quicker one. What it costs grows with
# what is stored, what it saves with both: at 1,024 positions they were even at 40 tokens.
MANY = 64

_OPSET = 24  # the first that writes into a tensor
_PAST = "past_key_values."
_KEYS, _LENGTHS, _ANGLES, _SCALES = slice(3, 5), slice(5, 7), slice(7, 9), slice(12, 14)
_LOW, _HIGH = -128.0, 127.0
_OF_CODES = ("kv_cache_bit_width", "k_quant_type", "v_quant_type")


def attend_in_floats(graph: EditedGraph) -> None:
    """Let layers that keep int8 keys and values of all positions read prompts in float32."""
    if not any(map(_keeps_codes, graph.nodes)):
        return
    step = _Step(graph)
    nodes = step.nodes
    for each in graph.nodes:
        nodes += _Layer(graph, step, each).nodes() if _keeps_codes(each) else [each]
    graph.nodes = nodes
    graph.require_opset(_OPSET)


def _keeps_codes(each: Fields) -> bool:
    """Whether a node is attention with int8 keys and values that are its own and never move."""
    return (
        attribute(each, "kv_cache_bit_width") is not None
        and attribute(each, "sliding_window_cache") is None
        and each["input"][_KEYS.start].startswith(_PAST)
    )


class _Nodes:
    """Nodes in their order, named below a path."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.nodes: list[Fields] = []

    def add(self, name: str, op_type: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node with one output; return what that is called."""
        self.nodes.append(node(op_type, inputs, f"{self._path}/{name}", **attributes))
        return f"{self._path}/{name}"


class _Step(_Nodes):
    """What all layers take of a step: made once, before the first of them."""

    def __init__(self, graph: EditedGraph) -> None:
        super().__init__("prompt")
        self._graph = graph
        self.first, self.second = self.constant("first", [0]), self.constant("second", [1])
        self.axis = self.constant("axis", [2])  # of positions, in keys and values
        self.low, self.high = self.constant("low", _LOW), self.constant("high", _HIGH)
        tokens = self.add("tokens", "Shape", ["token_index"], start=1, end=2)
        self.many = self.add("many", "Greater", [tokens, self.constant("few", [MANY - 1])])
        last = self.add("last", "Cast", ["seqlens_k"], to=CODES["int64"])
        new = self.add("new", "Sub", [tokens, self.second])
        self.stored = self.add("stored", "Sub", [last, new])  # positions before this step, [B]
        starts = self.add("starts", "Unsqueeze", [self.stored, self.second])
        count = self.add("count", "Squeeze", [tokens, self.first])
        run = [self.constant("zero", 0), count, self.constant("one", 1)]
        places = self.add("places", "Range", run)
        self.positions = self.add("positions", "Add", [starts, places])  # [B, T]
        total = self.add("total", "Cast", ["total_sequence_length"], to=CODES["int64"])
        self.end = self.add("end", "Unsqueeze", [total, self.first])

    def constant(self, name: str, numbers: int | float | list[int]) -> str:
        """Add a few numbers to the graph; return what they are called."""
        return self._graph.constant(f"prompt/{name}", numbers)


class _Layer:
    """Attention of one layer, made a choice of two branches."""

    def __init__(self, graph: EditedGraph, step: _Step, attention: Fields) -> None:
        self._step, self._attention = step, attention
        self._path = attention["output"][0]
        self._heads, self._kv_heads = (
            attribute(attention, name) for name in ("num_heads", "kv_num_heads")
        )
        (values,) = graph.tensors[attention["input"][_SCALES.start]]["dims"]
        self._width = values // self._kv_heads
        self._outside = _Nodes(f"{self._path}/prompt")
        self._inside = _Nodes(f"{self._path}/many")

    def nodes(self) -> list[Fields]:
        """Return what stands in the place of the attention."""
        outputs = self._attention["output"]
        few = [f"{each}/few" for each in outputs]
        direct = Branch([self._attention | {"output": few}], self._results(few))
        chosen = either(self._step.many, self._in_floats(), direct, outputs)
        return [*self._outside.nodes, chosen]

    def _results(self, names: list[str]) -> list[tuple[str, int]]:
        return list(zip(names, (CODES["float32"], CODES["int8"], CODES["int8"]), strict=True))

    def _in_floats(self) -> Branch:
        step, inputs, add = self._step, self._attention["input"], self._inside.add
        query, key, value = self._parts()
        turned = add(
            "turned",
            "RotaryEmbedding",
            [key, step.positions, *inputs[_ANGLES]],
            domain=CONTRIB,
            num_heads=self._kv_heads,
        )
        stored, floats = zip(
            *(
                self._stored(word, new, past, scale)
                for word, new, past, scale in zip(
                    ("key", "value"), (turned, value), inputs[_KEYS], inputs[_SCALES], strict=True
                )
            ),
            strict=True,
        )
        # Nothing is appended: keys and values of no position.
        nothing = add("nothing", "Slice", [key, step.first, step.first, step.second])
        attended = f"{self._path}/many"
        attention = node(
            "GroupQueryAttention",
            [query, nothing, nothing, *floats, *inputs[_LENGTHS], *inputs[_ANGLES]],
            attended,
            domain=CONTRIB,
        )
        attention["attribute"] = [
            each for each in self._attention["attribute"] if each["name"] not in _OF_CODES
        ]
        return Branch([*self._inside.nodes, attention], self._results([attended, *stored]))

    def _parts(self) -> list[str]:
        """Query, key and value apart: [B, T, heads * d]."""
        packed, key, value, *_ = self._attention["input"]
        if key:
            return [packed, key, value]
        sizes = [each * self._width for each in (self._heads, self._kv_heads, self._kv_heads)]
        names = [f"{self._path}/many/{word}" for word in ("query", "key", "value")]
        wanted = self._step.constant("/".join(map(str, ["parts", *sizes])), sizes)
        self._inside.nodes.append(node("Split", [packed, wanted], *names, axis=-1))
        return names

    def _stored(self, word: str, new: str, past: str, scale: str) -> tuple[str, str]:
        """Round and store new keys or values; return all codes, and what they stand for."""
        step, add = self._step, self._inside.add
        shape = f"{self._kv_heads}.{self._width}"
        heads = step.constant(f"heads.{shape}", [0, 0, self._kv_heads, self._width])
        across = step.constant(f"across.{shape}", [1, self._kv_heads, 1, self._width])
        steps = self._outside.add(f"{word}/steps", "Reshape", [scale, across])
        inverse = self._outside.add(f"{word}/inverse", "Reciprocal", [scale])
        nearest = add(f"{word}/nearest", "Round", [add(f"{word}/scaled", "Mul", [new, inverse])])
        clipped = add(f"{word}/clipped", "Clip", [nearest, step.low, step.high])
        codes = add(f"{word}/codes", "Cast", [clipped], to=CODES["int8"])
        apart = add(f"{word}/apart", "Reshape", [codes, heads])
        rows = add(f"{word}/rows", "Transpose", [apart], perm=[0, 2, 1, 3])
        stored = add(f"{word}/stored", "TensorScatter", [past, rows, step.stored], axis=2)
        read = add(f"{word}/read", "Slice", [stored, step.first, step.end, step.axis])
        wide = add(f"{word}/wide", "Cast", [read], to=CODES["float32"])
        return stored, add(f"{word}/floats", "Mul", [wide, steps])
