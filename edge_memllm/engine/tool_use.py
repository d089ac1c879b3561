"""What a reply with tools may hold, and how its calls are read: from the prompt to the parser.

Between the formats, which know no tokens, and whoever generates: the server, or a program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_memllm.engine.grammar import MakeConstraint, json_rule
from edge_memllm.engine.response_format import ResponseFormat
from edge_memllm.sampling import Constraint, LeaningConstraint
from edge_memllm.text.tokenization import Detokenizer, Tokenizer
from edge_memllm.text.tools.formats import Tool, ToolFormat
from edge_memllm.text.tools.parsing import ToolCallParser
from edge_memllm.text.tools.spelling import call_grammar

Need: TypeAlias = Literal["auto", "required"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of one reply.

    Attributes:
        format: How calls are written.
        tools: Those that may be called.
        need: Whether there has to be a call.
        parallel: Whether there may be several.
        answer: The schema of what comes in place of calls, where that is JSON.
    """

    format: ToolFormat
    tools: tuple[Tool, ...]
    need: Need = "auto"
    parallel: bool = True
    answer: Mapping[str, Any] | None = None

    @property
    def from_the_start(self) -> bool:
        """Whether all of the reply is held to a grammar; else from where a call begins."""
        return self.need == "required" or self.answer is not None

    def parser(self, *, certain: bool = True) -> ToolCallParser:
        """Return what reads a reply; `certain` where a constraint of these tools holds it."""
        schemas = {tool.name: tool.schema for tool in self.tools}
        return ToolCallParser(self.format, schemas, certain=certain)

    def shown_tokens(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the special tokens that have to stand in the text for its calls to be found."""
        found = map(tokenizer.special_token, self.format.tokens)
        return tuple(token for token in found if token is not None)

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return tokens that end a reply with calls, beside those of the model."""
        found = map(tokenizer.special_token, self.format.ends)
        return tuple(token for token in found if token is not None)

    def grammar(self, tokenizer: Tokenizer) -> str:
        """Return the grammar of calls, and of the answer that may come in their place, in Lark."""
        return call_grammar(
            self.format,
            self.tools,
            tokenizer.token,
            json_rule,
            parallel=self.parallel,
            answer=None
            if self.need == "required" or self.answer is None
            else json_rule(self.answer),
        )

    def form(self, tokenizer: Tokenizer) -> ResponseFormat:
        """Return what a constraint is made of: `grammar`, as a form of replies."""
        return ResponseFormat("calls", self.grammar(tokenizer))

    def of_any_arguments(self) -> ToolUse:
        """Return the same where arguments are any object, but for tools that are strict."""
        loose = (t if t.strict else replace(t, parameters={"type": "object"}) for t in self.tools)
        return replace(self, tools=tuple(loose))

    def constraint(self, calls: MakeConstraint, tokenizer: Tokenizer) -> MakeConstraint:
        """Return what holds a reply to `calls`, which was made of the grammar."""
        if self.from_the_start:
            return calls
        return lambda: _OnceBegun(
            calls, tokenizer, self._beginnings(), self.shown_tokens(tokenizer)
        )

    def _beginnings(self) -> _Beginnings:
        spelling = self.format.spelling
        before = (spelling.begin + spelling.call).partition("{name}")[0]
        return _Beginnings(
            marks=tuple(dict.fromkeys(str(pattern[0]) for pattern in self.format.heads)),
            first=tuple(before + tool.name for tool in self.tools if self.format.first),
        )


@dataclass(frozen=True, slots=True)
class _Beginnings:
    """What a call begins with: `marks` wherever they stand, `first` where the reply begins."""

    marks: tuple[str, ...]
    first: tuple[str, ...]

    def place(self, text: str, at: int) -> int | None:
        """Return where a call begins, not before `at`; None where none does."""
        found = [place for mark in self.marks if (place := text.find(mark, at)) >= 0]
        start = len(text) - len(text.lstrip())
        if start >= at and any(text.startswith(each, start) for each in self.first):
            found.append(start)
        return min(found, default=None)


class _OnceBegun:
    """A `Constraint` that leaves a text free until a call begins in it."""

    def __init__(
        self,
        calls: Callable[[], Constraint],
        tokenizer: Tokenizer,
        beginnings: _Beginnings,
        shown: Sequence[int],
    ) -> None:
        self._calls = calls
        self._tokenizer = tokenizer
        self._beginnings = beginnings
        self._detokenizer = Detokenizer(tokenizer, shown)
        self._text = ""
        self._looked = 0  # up to where no call begins that the grammar knows
        self._began: Constraint | None = None

    def allowed(self) -> NDArray[np.bool_] | None:
        """Return which tokens [V] may come next; None, for all, before a call."""
        return None if self._began is None else self._began.allowed()

    def bias(self) -> NDArray[np.float32] | None:
        """Return what brings a long call to its end."""
        return self._began.bias() if isinstance(self._began, LeaningConstraint) else None

    def advance(self, token: int) -> None:
        """Take the token that was chosen."""
        if self._began is not None:
            self._began.advance(token)
            return
        self._text += self._detokenizer.push(token)
        while self._began is None:
            place = self._beginnings.place(self._text, self._looked)
            if place is None:
                return
            self._began = self._begun(self._text[place:])
            self._looked = place + 1

    def _begun(self, text: str) -> Constraint | None:
        """Return what goes on behind the beginning of a call; None if the grammar has no such."""
        began = self._calls()
        for token in self._tokenizer.encode(text, special=False):
            mask = began.allowed()
            if mask is not None and not mask[token]:
                return None
            began.advance(token)
        return began
