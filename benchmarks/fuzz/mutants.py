"""Changes to the files of an artifact: of bytes, and of what the bytes mean.

A number makes a mutant, always the same one: which file, which changes, and whether digests are
written again afterwards, so that the change is not found by them but by what reads the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks.fuzz.artifact import Files, vouched
from edge_memllm.artifact.manifest import MANIFEST_NAME

# Values that programs stumble over, in JSON.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 255, 256, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 63),
    *(1 << 64, -(1 << 63), 10**30, 0.0, -0.5, 1e-300, 1e308, 0.1),
    *(
        "",
        "a",
        " ",
        "\x00",
        "\ud800",
        "é",
        "../x",
        "/etc/passwd",
        "a" * 70_000,
        "<s>",
        "\U0001f642",
    ),
    *([], {}, [[]], [None], {"a": 1}, ["a", "b"], [0] * 3000),
)
# The same as text, for what a writer of JSON would not write.
_TEXTS = (b"NaN", b"Infinity", b"-0", b"1e999", b"9" * 5000, b"[" * 5000, b'{"a":' * 3000)
_NUMBERS = (0, 1, 2, 7, 8, 16, 31, 32, 127, 128, 255, 1 << 14, (1 << 31) - 1, 1 << 31)
_WIDE = (*_NUMBERS, 1 << 32, (1 << 32) + 106, (1 << 35) + 106, 1 << 62, (1 << 64) - 1)
_JINJA = (
    "{{ 'a' * 1000000000 }}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{{ range(10**9)|list }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ x.y.z }}",
    "{% set a = ['x'] %}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{%",
    "}}",
    "{# ",
    "{{ messages }}",
    "{{ raise_exception('no') }}",
    "{{ 10**100000 }}",
    "{{ 10**10**10 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ 1/0 }}",
    "{% include 'x' %}",
    "{% break %}",
    "{{ messages|tojson(indent=999999999) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "{{ " + "(" * 500 + ")" * 500 + " }}",
    "{% if true %}" * 300,
    "{{ strftime_now('%Y' * 100000) }}",
    "{{ lipsum(n=1000000) }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ messages|batch(1, 1000000000)|list }}",
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """Files with something changed in one of them."""

    name: str  # of the file
    how: str
    rewritten: bool  # digests vouch for the change
    files: Files


def make_mutant(base: Files, seed: int, number: int) -> Mutant:
    """Return the mutant of this number."""
    choose = Random(f"{seed}/{number}")
    name = choose.choice(sorted(base))
    rewritten = choose.random() < 0.7
    data = base[name]
    changes = _CHANGES.get(name.rsplit(".", 1)[-1], []) + _CHANGES["*"]
    words = []
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        change = choose.choice(changes)
        words.append(change.__name__.strip("_"))
        data = change(choose, data)
    files = base | {name: data}
    return Mutant(name, "+".join(words), rewritten, vouched(files) if rewritten else files)


# --- bytes ----------------------------------------------------------------------------------------


def _flip(choose: Random, data: bytes) -> bytes:
    if not data:
        return b"\x00"
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 8))):
        changed[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    return bytes(changed)


def _overwrite(choose: Random, data: bytes) -> bytes:
    place, count = choose.randrange(len(data) + 1), choose.choice((1, 2, 4, 8, 64))
    filling = choose.choice((b"\x00", b"\xff", b"\x7f", b"\x80", choose.randbytes(1)))
    return data[:place] + filling * count + data[place + count :]


def _cut(choose: Random, data: bytes) -> bytes:
    return data[: choose.randrange(len(data) + 1)]


def _remove(choose: Random, data: bytes) -> bytes:
    place = choose.randrange(len(data) + 1)
    return data[:place] + data[place + choose.choice((1, 2, 8, 100)) :]


def _insert(choose: Random, data: bytes) -> bytes:
    place = choose.randrange(len(data) + 1)
    return data[:place] + choose.randbytes(choose.choice((1, 1, 4, 16))) + data[place:]


def _repeat(choose: Random, data: bytes) -> bytes:
    place, other = sorted(choose.randrange(len(data) + 1) for _ in range(2))
    return data[:other] + data[place : min(other, place + 4096)] + data[other:]


def _swap(choose: Random, data: bytes) -> bytes:
    first, second = (choose.randrange(len(data) + 1) for _ in range(2))
    count, changed = choose.choice((1, 8, 512)), bytearray(data)
    changed[first : first + count], changed[second : second + count] = (
        data[second : second + count],
        data[first : first + count],
    )
    return bytes(changed)


def _numbers(choose: Random, data: bytes) -> bytes:
    """NaN, infinity or the largest half float over some bytes of weights or records."""
    word = choose.choice((b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\xff\x7b", b"\x01\x00"))
    place = choose.randrange(len(data) + 1) & ~1
    return data[:place] + word * choose.choice((1, 4, 64)) + data[place + 2 :]


# --- JSON -----------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    keys: Any = value if isinstance(value, dict) else ()
    if isinstance(value, list):
        keys = range(min(len(value), 40))
    for key in keys:
        found += _places(value[key], (*path, key))
    return found


def _json(choose: Random, data: bytes) -> bytes:
    """Another value, key or order somewhere; or text that is no JSON in its place."""
    start = 8 if data[:1] != b"{" and data[8:9] == b"{" else 0  # behind the length of a header
    try:
        end = start + int.from_bytes(data[:8], "little") if start else len(data)
        content = json.loads(data[start:end])
    except (ValueError, RecursionError):
        return _flip(choose, data)
    places = _places(content)
    # A vocabulary has most of the places; half of all changes are to be above it.
    few = [place for place in places if len(place) < 3]
    path = choose.choice(choose.choice((places, few)))
    if not path:
        return data[:start] + choose.choice(_TEXTS) + data[end:]
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    key, mark = path[-1], "\x01mark"
    match choose.randrange(6):
        case 0 if isinstance(holder, dict):
            holder[choose.choice(("x", "", key + "x"))] = holder.pop(key)
        case 1:
            del holder[key]
        case 2:
            other = choose.choice(places[1:])
            found = content
            for each in other:
                found = found[each]
            holder[key] = json.loads(json.dumps(found))
        case 3:
            holder[key] = mark
        case 4 if type(holder[key]) is int:
            holder[key] += choose.choice((-1, 1, 1 << 16))
        case _:
            holder[key] = choose.choice(_VALUES)
    text = json.dumps(content, indent=choose.choice((None, 1, 2))).encode("ascii", "replace")
    text = text.replace(json.dumps(mark).encode(), choose.choice(_TEXTS))
    if choose.random() < 0.05:
        text = text.replace(b"{", b'{"x":1,"x":2,', 1)
    return data[:start] + (text.ljust(end - start) if start else text) + data[end:]


# --- protobuf -------------------------------------------------------------------------------------


def _varint(value: int, longer: int = 0) -> bytes:
    parts = []
    while value > 0x7F or len(parts) < longer:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _take(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[place] & 0x7F) << shift
        shift, place = shift + 7, place + 1
        if data[place - 1] < 0x80:
            return value, place


def _fields(data: bytes) -> list[tuple[int, Any]] | None:
    """Split a message into tags and values; None when it is none."""
    found: list[tuple[int, Any]] = []
    place = 0
    try:
        while place < len(data):
            tag, place = _take(data, place)
            width = {1: 8, 5: 4}.get(tag & 7, 0)
            if tag & 7 == 0:
                value, place = _take(data, place)
                found.append((tag, value))
                continue
            if tag & 7 == 2:
                width, place = _take(data, place)
            if tag & 7 not in (1, 2, 5) or tag >> 3 == 0 or place + width > len(data):
                return None
            found.append((tag, data[place : place + width]))
            place += width
    except IndexError:
        return None
    return found


def _joined(fields: list[tuple[int, Any]], choose: Random | None = None) -> bytes:
    parts = []
    for tag, value in fields:
        longer = choose.randrange(1, 9) if choose and choose.random() < 0.02 else 0
        parts.append(_varint(tag, longer))
        if isinstance(value, int):
            parts.append(_varint(value, longer))
        else:
            parts.append(_varint(len(value), longer) + value if tag & 7 == 2 else value)
    return b"".join(parts)


def _protobuf(choose: Random, data: bytes, depth: int = 0) -> bytes:
    """Another field, number or order somewhere inside, lengths around it put right."""
    fields = _fields(data)
    if not fields or len(data) > 1 << 20:
        return _flip(choose, data)
    place = choose.randrange(len(fields))
    tag, value = fields[place]
    inner = _fields(value) if isinstance(value, bytes) and tag & 7 == 2 else None
    if inner and depth < 8 and choose.random() < 0.85:
        fields[place] = (tag, _protobuf(choose, value, depth + 1))
        return _joined(fields)
    match choose.randrange(8):
        case 0:
            del fields[place]
        case 1:
            fields.insert(choose.randrange(len(fields) + 1), fields[place])
        case 2:
            other = choose.randrange(len(fields))
            fields[place], fields[other] = fields[other], fields[place]
        case 3:
            wide = choose.choice((0, 1 << 32, 1 << 35, 1 << 63))
            fields[place] = (choose.randrange(1, 30) << 3 | tag & 7 | wide, value)
        case 4 if isinstance(value, int):
            fields[place] = (tag, choose.choice(_WIDE))
        case 5 if isinstance(value, int):
            fields[place] = (tag, max(0, value + choose.choice((-1, 1))))
        case 6 if isinstance(value, bytes) and tag & 7 == 2:
            words = (
                b"",
                b"Loop",
                b"If",
                b"ConstantOfShape",
                b"location",
                b"../x",
                b"graph.onnx.data",
            )
            fields[place] = (tag, choose.choice(words))
        case 7:
            return _joined(fields, choose)
        case _:
            fields[place] = (
                tag,
                _flip(choose, value) if isinstance(value, bytes) and tag & 7 == 2 else value,
            )
    return _joined(fields)


# --- templates ------------------------------------------------------------------------------------


def _jinja(choose: Random, data: bytes) -> bytes:
    place = choose.randrange(len(data) + 1)
    return data[:place] + choose.choice(_JINJA).encode() + data[place:]


_CHANGES: dict[str, list[Callable[[Random, bytes], bytes]]] = {
    "*": [_flip, _overwrite, _cut, _remove, _insert, _repeat, _swap],
    "json": [_json] * 16,
    "onnx": [_protobuf] * 16,
    "data": [_numbers] * 5,
    "safetensors": [_numbers] * 5 + [_json] * 5,
    "jinja": [_jinja] * 12,
}
assert MANIFEST_NAME.endswith(".json")
