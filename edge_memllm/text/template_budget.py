"""A sandbox for Jinja templates that nobody has checked: what one may compute and hold is bounded.

Jinja's own sandbox keeps a template from the interpreter, not from its time and memory: two nested
loops, a doubled string or `'%1000000000d'` are enough. Here a template is rewritten before it is
compiled, so that every round of a loop, every call, filter, test and operator, and every value that
may be large goes through a `Budget`. It counts work, which stands for time, and the bytes of what
is made. Both grow with what the template is given, so that a long conversation is no attack, and
both depend on the template and its input alone: what is refused once is refused everywhere.

Values are weighed as trees, with what they refer to as often as they refer to it, because that is
what comparing or printing them costs: a list that holds another twice, thirty times over, is small
in memory and endless to print. A value heavier than what may still be made is refused when it is
made, so one operation never takes more than a budget allows, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from string import Formatter
from sys import getsizeof
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.visitor import NodeTransformer

# Work is counted in what a byte costs to look at, roughly 4 ns: about a second, and half a
# microsecond more for each byte that is given.
WORK = 1 << 28
WORK_PER_BYTE = 128
# Bytes of all that is made, whether it is kept or not.
MADE = 1 << 26
MADE_PER_BYTE = 16

_STEP = 256  # work of a call, or of a round of a loop
_LOOK = 8  # work for each byte of a value that a filter or method goes over
_ITEM = 32  # work of weighing an item of a container
_NODE = 16  # work of each part of a loop's body, every round
_MOST_BITS = 1 << 16  # of an integer
_MOST_DIGITS = 400  # of a width or a precision
_OF_JINJA = ("_loop_vars", "_block_vars")  # passed with each call in a loop or a block
_OBJECT = 64  # what is held without being text, number or container
_CONTAINERS = (list, tuple, dict, set, frozenset)
_PLAIN = {str, int, float, bool, type(None)}
_VIEWS = (KeysView, ValuesView, ItemsView)


class TemplateLimitError(TemplateError):
    """A template asks for more than it may have."""


class Budget:
    """What one rendering may still do. Containers are never changed, so a weight is kept."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._weights: dict[int, tuple[object, int]] = {}
        self._most = self._work = 1 << 62
        weight = self.weight(dict(given))
        self._work = WORK + WORK_PER_BYTE * weight
        self._made = self._most = MADE + MADE_PER_BYTE * weight

    def work(self, amount: int = _STEP) -> None:
        """Count work; raises `TemplateLimitError` when there has been too much."""
        self._work -= amount
        if self._work < 0:
            raise TemplateLimitError("it takes too many steps.")

    def make(self, size: int) -> None:
        """Count bytes that are about to be made, and the work of making them."""
        self._made -= size
        if self._made < 0:
            raise TemplateLimitError("it makes too much text or too many values.")
        self.work(size)

    def weight(self, value: object) -> int:
        """Return the bytes of a value with all that it refers to, as often as it does."""
        if type(value) in _PLAIN:
            return getsizeof(value)
        if isinstance(value, _CONTAINERS):
            known = self._weights.get(id(value))
            return self._tree(value) if known is None else known[1]
        if isinstance(value, _VIEWS):
            return self._sum(value, _OBJECT)
        if isinstance(value, range):
            return 32 * len(value)
        return getsizeof(value) if isinstance(value, (str, int, bytes)) else _OBJECT

    def made(self, value: Any) -> Any:
        """Count a value that has just been made, and return it."""
        if isinstance(value, Iterator):
            return self._counted(value)
        if isinstance(value, _CONTAINERS):
            self.weight(value)  # refuses one that is too heavy
            self.make(getsizeof(value))
        elif isinstance(value, str | int):
            self.make(getsizeof(value))
        return value

    def look(self, *values: object) -> None:
        """Count the work of going over values a few times."""
        for value in values:
            self.work(_LOOK * self.weight(value))

    def _tree(self, value: Any) -> int:
        total = self._sum(value, getsizeof(value))
        if isinstance(value, dict):
            total = self._sum(value.values(), total)
        self._weights[id(value)] = value, total  # which keeps it, and so its id
        return total

    def _sum(self, items: Any, total: int) -> int:
        self.work(_ITEM * len(items))
        for item in items:
            total += self.weight(item)
            if total > self._most:
                raise TemplateLimitError("a value is too large.")
        return total

    def _counted(self, items: Any) -> Iterator[Any]:
        """What a lazy filter yields: work when it is asked for."""
        for item in items:
            self.work()
            if isinstance(item, _CONTAINERS):
                self.made(item)
            yield item


_CURRENT: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def spending(given: Mapping[str, Any]) -> Iterator[None]:
    """Within this context templates are rendered, given these variables."""
    token = _CURRENT.set(Budget(given))
    try:
        yield
    finally:
        _CURRENT.reset(token)


# What filters and methods cost, counted before they do it. The parameters are theirs, after the
# value itself. What is not named here is taken to go over its values a few times.


def _replaced(budget: Budget, s: Any, old: Any, new: Any, count: Any = None) -> None:
    text, old = _text(budget, s), _text(budget, old)
    times = text.count(old) if old else len(text) + 1
    budget.make(getsizeof(text) + times * _held(_text(budget, new)))


def _padded(budget: Budget, value: Any, width: Any = 80, fillchar: Any = " ") -> None:
    budget.make(4 * (_size(width) + budget.weight(value)))


def _tabbed(budget: Budget, value: str, tabsize: Any = 8) -> None:
    budget.make(4 * (_size(tabsize) + 1) * len(value))


def _indented(budget: Budget, s: Any, width: Any = 4, first: Any = 0, blank: Any = 0) -> None:
    text = _text(budget, s)
    step = budget.weight(width) if isinstance(width, str) else 4 * _size(width)
    budget.make(getsizeof(text) + (step + _OBJECT) * _lines(text))


def _joined(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> None:
    budget.make(4 * budget.weight(value) + len(value) * _held(_text(budget, d)))


def _joined_by(budget: Budget, separator: str, items: Any) -> None:
    _joined(budget, items, separator)


def _split(budget: Budget, value: str, sep: Any = None, maxsplit: Any = -1) -> None:
    parts = 1 + (value.count(sep) if isinstance(sep, str) and sep else len(value) // 2)
    budget.make(getsizeof(value) + _OBJECT * parts)


def _split_into_lines(budget: Budget, value: str, keepends: Any = False) -> None:
    budget.make(getsizeof(value) + _OBJECT * _lines(value))


def _split_into_words(budget: Budget, s: Any) -> None:
    text = _text(budget, s)
    budget.make(getsizeof(text) + _OBJECT * len(text))


def _lines(text: str) -> int:
    return 1 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))


def _listed(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    """Count the letters of a text as values of their own; Python keeps the first 256."""
    if isinstance(value, str):
        budget.make((8 if value.isascii() else 84) * len(value))


def _batched(budget: Budget, value: Any, count: Any, fill_with: Any = None) -> None:
    budget.make(budget.weight(value) + _OBJECT * _size(count))


def _summed(budget: Budget, iterable: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        budget.make((len(iterable) + 1) * (budget.weight(start) + budget.weight(iterable)))


def _written_as_json(
    budget: Budget,
    x: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> None:
    weight = budget.weight(x)
    budget.make(4 * weight)
    if indent is not None:
        step = len(indent) if isinstance(indent, str) else _size(indent)
        budget.make(step * _depth(x) * weight // 16)
    if separators is not None:
        budget.make(sum(map(len, separators)) * weight // 16)


def _rounded(budget: Budget, value: Any, precision: Any = 0, method: Any = "common") -> None:
    if abs(precision) > _MOST_DIGITS:
        raise TemplateLimitError("a precision is too large.")


def _gone_over(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    """For what looks at all of a text for each part of it."""
    weight = budget.weight(value)
    budget.make(4 * weight)
    budget.work(weight * weight)


def _ordered(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    budget.work(32 * budget.weight(value))


def _translated(budget: Budget, value: str, table: Any) -> None:
    longest = max((budget.weight(each) for each in table.values()), default=0)
    budget.make(len(value) * (longest + 4))


def _percent_filled(budget: Budget, value: Any, *values: Any, **named: Any) -> None:
    text, fields = _text(budget, value), 0
    if _NESTED_KEY.search(text):
        raise TemplateLimitError("a name in brackets has brackets.")
    for field in _PERCENT.finditer(text):
        fields += 1
        _check_digits(field.group(), "*")
    _filled(budget, text, fields, (*values, *named.values()))


def _filled_in(budget: Budget, value: str, *values: Any, **named: Any) -> None:
    fields = 0
    for _, name, form, _ in Formatter().parse(value):
        if name is not None:
            fields += 1
            _check_digits(form or "", "{")
    _filled(budget, value, fields, (*values, *named.values()))


def _filled(budget: Budget, text: str, fields: int, values: tuple[Any, ...]) -> None:
    """Count a text whose fields hold any of the values, each."""
    largest = 4 * (sum(map(budget.weight, values)) + 2 * 10**_MOST_WIDTH_DIGITS)
    budget.make(getsizeof(text) + fields * largest)


def _check_digits(form: str, computed: str) -> None:
    """Refuse a width that is a value, or wider than any use of it."""
    if computed in form or _WIDE.search(form):
        raise TemplateLimitError("a field is too wide, or as wide as a value says.")


def _text(budget: Budget, value: Any) -> str:
    if not isinstance(value, str):
        budget.make(4 * budget.weight(value))
    return str(value)


def _held(value: str | list[Any] | tuple[Any, ...]) -> int:
    """Return the bytes of the letters or places themselves."""
    return getsizeof(value) - getsizeof(type(value)())


def _size(value: Any) -> int:
    """Return a width or a number of parts that is asked for; what is none fails later."""
    return abs(value) if isinstance(value, int) else 0


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, _CONTAINERS) else 0


_MOST_WIDTH_DIGITS = 3
_WIDE = re.compile(rf"\d{{{_MOST_WIDTH_DIGITS + 1}}}")
_PERCENT = re.compile(r"%%|%(?:\([^)]*\))?[#0 +-]*(?:\*|\d*)(?:\.(?:\*|\d*))?")
_NESTED_KEY = re.compile(r"%\([^)]*\(")
_FILTER_COSTS: dict[str, Callable[..., None]] = {
    "replace": _replaced,
    "center": _padded,
    "indent": _indented,
    "join": _joined,
    "batch": _batched,
    "slice": _batched,
    "sum": _summed,
    "tojson": _written_as_json,
    "format": _percent_filled,
    "round": _rounded,
    **dict.fromkeys(("title", "wordcount"), _split_into_words),
    **dict.fromkeys(("sort", "dictsort", "unique", "groupby", "min", "max"), _ordered),
    **dict.fromkeys(("urlize", "striptags", "wordwrap", "pprint", "xmlattr"), _gone_over),
}
_TEXT_COSTS: dict[str, Callable[..., None]] = {
    "replace": _replaced,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    "expandtabs": _tabbed,
    "join": _joined_by,
    **dict.fromkeys(("split", "rsplit"), _split),
    "splitlines": _split_into_lines,
    "translate": _translated,
    **dict.fromkeys(("format", "format_map"), _filled_in),
}
# These look at the top of what they are given, no deeper.
_SHALLOW_FILTERS = {"length", "count", "first", "default", "d", "attr"}
_SHALLOW_TESTS = {
    *("defined", "undefined", "none", "boolean", "false", "true", "integer", "float", "number"),
    *("string", "mapping", "iterable", "sequence", "callable", "sameas", "escaped", "odd", "even"),
    *("divisibleby", "filter", "test"),
}
_SHALLOW_METHODS = {"get", "items", "keys", "values", "copy"}
# These go through what they are given at once, a generator too.
_EAGER = {"join", "sum", "sort", "unique", "groupby", "min", "max", "batch", "slice", "list"}


def _counting_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts. It takes the context, so that it is never folded into a constant."""
    passed, cost = _passed(function), _FILTER_COSTS.get(name)

    @pass_context
    def counting(context: Any, value: Any = None, *args: Any, **named: Any) -> Any:
        budget = _CURRENT.get()
        budget.work()
        if name in _EAGER:
            _listed(budget, value)
            value = budget.made(list(value)) if isinstance(value, Iterator) else value
        if cost is not None:
            cost(budget, value, *args, **named)
        if name not in _SHALLOW_FILTERS:
            budget.look(value, *args, *named.values())
        return budget.made(function(*passed(context), value, *args, **named))

    return counting


def _counting_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = _passed(function)

    @pass_context
    def counting(context: Any, *args: Any, **named: Any) -> Any:
        budget = _CURRENT.get()
        budget.work()
        if name not in _SHALLOW_TESTS:
            budget.look(*args)
        return function(*passed(context), *args, **named)

    return counting


def _passed(function: Callable[..., Any]) -> Callable[[Any], tuple[Any, ...]]:
    """What Jinja passes to a filter in front of the value."""
    return {
        None: lambda context: (),
        "context": lambda context: (context,),
        "eval_context": lambda context: (context.eval_ctx,),
        "environment": lambda context: (context.environment,),
    }[getattr(getattr(function, "jinja_pass_arg", None), "name", None)]


@pass_context
def _round(context: Any, parts: int, text: int) -> str:
    """Count a round of a loop or a run of a macro, the parts of its body and the text in it."""
    budget = _CURRENT.get()
    budget.work(_STEP + _NODE * parts)
    budget.make(text)
    return ""


@pass_context
def _tried(context: Any, value: Any) -> Any:
    """Count a round that a loop's condition may leave out."""
    _CURRENT.get().work()
    return value


@pass_context
def _made(context: Any, value: Any) -> Any:
    """Count a value that the template's own syntax makes."""
    return _CURRENT.get().made(value)


@pass_context
def _compared(context: Any, value: Any) -> Any:
    """Count what comparing a value may cost."""
    _CURRENT.get().look(value)
    return value


@pass_context
def _written(context: Any, value: Any) -> Any:
    """Count what is written out or put into a text."""
    budget = _CURRENT.get()
    budget.make(getsizeof(value) if isinstance(value, str) else 4 * budget.weight(value))
    return value


# Called as filters, under names that no template can write.
_OWN = {"<round>": _round, "<tried>": _tried, "<made>": _made, "<compared>": _compared}
_OWN["<written>"] = _written


class _Rewriting(NodeTransformer):
    """Puts counting into a parsed template, wherever its syntax works without calling."""

    def visit(self, node: nodes.Node, *_: Any, **__: Any) -> nodes.Node:
        """Return the node that takes the place of this one, its parts done already."""
        begin = _begin(node) if isinstance(node, _WITH_BODY) else None
        self.generic_visit(node)
        if begin is not None:
            node.body.insert(0, begin)  # type: ignore[attr-defined]
        match node:
            case nodes.For(test=nodes.Expr()):
                node.test = _call("<tried>", node.test)
            case nodes.Compare():
                node.expr = _call("<compared>", node.expr)
                for each in node.ops:
                    each.expr = _call("<compared>", each.expr)
            case nodes.Concat():
                node.nodes = [_call("<written>", each) for each in node.nodes]
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load"):
                return _call("<made>", node)
            case nodes.Getitem(arg=nodes.Slice()):
                return _call("<made>", node)
        return node


_WITH_BODY = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


def _begin(node: nodes.Node) -> nodes.ExprStmt:
    """What counts a body, at its beginning."""
    parts = list(node.find_all(nodes.Node))
    text = sum(getsizeof(each.data) for each in parts if isinstance(each, nodes.TemplateData))
    return nodes.ExprStmt(_call("<round>", nodes.Const(len(parts)), nodes.Const(text)))


def _call(name: str, node: Any, *more: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(more), [], None, None, lineno=node.lineno)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that count. Render them within `spending`."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        """Take filters besides Jinja's own, and options of a Jinja environment."""
        super().__init__(**options, optimized=False, finalize=_written)
        known = {**FILTERS, **filters}
        tests: dict[str, Any] = dict(TESTS)
        self.filters = {name: _counting_filter(name, each) for name, each in known.items()} | _OWN
        self.tests = {name: _counting_test(name, each) for name, each in tests.items()}
        del self.globals["lipsum"]  # as much text as one likes, and a known way out of sandboxes

    def _generate(self, source: nodes.Template, *args: Any, **named: Any) -> str:
        _Rewriting().visit(source)
        return super()._generate(source, *args, **named)

    def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:
        """Call what a template calls, counted."""
        budget = _CURRENT.get()
        budget.work()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        given = {name: each for name, each in named.items() if name not in _OF_JINJA}
        if isinstance(method, BuiltinMethodType):
            args = self._count_method(budget, method, args, given)
        else:
            budget.look(*args, *given.values())
        return budget.made(super().call(context, function, *args, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute with an operator, counted."""
        budget = _CURRENT.get()
        budget.work()
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in ("*", "**"):
            _check_bits(operator, left, right)
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(value, (str, list, tuple)):
                budget.make(max(times, 0) * _held(value))
        elif operator == "%" and isinstance(left, str):
            _percent_filled(budget, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def _count_method(
        self, budget: Budget, method: BuiltinMethodType, args: tuple[Any, ...], named: Any
    ) -> tuple[Any, ...]:
        """Count a method of a text or a container; return its arguments, none a generator."""
        value, name = method.__self__, method.__name__
        if not isinstance(value, (str, range, *_CONTAINERS, *_VIEWS)):
            raise TemplateLimitError(
                f"the method {name} of {type(value).__name__} is not one for templates."
            )
        args = tuple(budget.made(list(a)) if isinstance(a, Iterator) else a for a in args)
        cost = _TEXT_COSTS.get(name) if isinstance(value, str) else None
        if cost is not None:
            cost(budget, value, *args, **named)
        budget.look(*(() if name in _SHALLOW_METHODS else (value,)), *args, *named.values())
        return args


def _check_bits(operator: str, left: int, right: int) -> None:
    bits = left.bit_length(), right.bit_length()
    most = sum(bits) if operator == "*" else bits[0] * max(right, 1)
    if most > _MOST_BITS:
        raise TemplateLimitError("a number is too large.")
