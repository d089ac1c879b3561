"""Text of a form, token by token: what a schema, an expression or a grammar allows, by llguidance.

Makes `sampling.Constraint`s for one model's vocabulary. Knows nothing of requests or logits.
Needs the extra `serve`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.engine.grammar_trial import READY
from edge_memllm.engine.json_ending import JsonEnding, TokenBytes, closed
from edge_memllm.engine.response_format import ResponseFormat
from edge_memllm.errors import RequestError, RuntimeUnavailableError, missing_extra
from edge_memllm.process.forking import ProcessLock
from edge_memllm.sampling import Constraint, LeaningConstraint
from edge_memllm.text.reasoning import Reasoning, ReasoningParser
from edge_memllm.text.tokenization import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MakeConstraint = Callable[[], Constraint]

# White space is fixed: free, it lets a small model write line breaks until its tokens are used up.
# And a schema cannot ask for words of its own to be overlooked.
_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
_SILENT = 0
_PYTHON = re.compile(r"(python|pypy|graalpy)[\d.]*[a-z]?(-\w+)?(\.exe)?", re.IGNORECASE)
# Forms whose grammars are kept: programs ask with the same few again and again.
_KEPT = 32
TRIAL_SECONDS = 3.0
_TRIAL = Path(__file__).with_name("grammar_trial.py")


class Grammars:
    """Compiles forms for one model. Thread-safe; the vocabulary is prepared on first use."""

    def __init__(self, tokenizer: Tokenizer, model: ModelSpec) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._lock = ProcessLock()
        self._vocabulary: LLTokenizer | None = None
        self._token_bytes: TokenBytes | None = None
        self._compiled: OrderedDict[ResponseFormat, LLMatcher] = OrderedDict()

    def kept(self, form: ResponseFormat) -> MakeConstraint | None:
        """Return what `constraints` returned for a form, if that was not long ago."""
        with self._lock:
            compiled = self._compiled.get(form)
        return None if compiled is None else self._maker(form, compiled)

    def constraints(self, form: ResponseFormat) -> MakeConstraint:
        """Return what makes a constraint to a form; may take seconds, but for any JSON object.

        Raises `RequestError` for a form that is none, that nothing fits, that asks for what
        cannot be kept to, or takes too long; `RuntimeUnavailableError` without llguidance, or
        where there is no Python to try it out in.
        """
        with self._lock:
            compiled = self._compiled.pop(form, None)
        if compiled is None:
            compiled = self._compile(form)
        with self._lock:
            self._compiled[form] = compiled
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return self._maker(form, compiled)

    def _maker(self, form: ResponseFormat, compiled: LLMatcher) -> MakeConstraint:
        if not form.has_json:
            return lambda: GrammarConstraint(compiled.deep_copy(), form.noun)
        tokens = self._bytes()
        return lambda: GrammarConstraint(compiled.deep_copy(), form.noun, JsonEnding(tokens))

    def _compile(self, form: ResponseFormat) -> LLMatcher:
        vocabulary = self._prepared()
        from llguidance import LLMatcher

        grammar = _grammar(form)
        if form.kind != "json_object":  # a schema of our own needs no trial
            _try_out(grammar, form.noun)
        compiled = LLMatcher(vocabulary, grammar, log_level=_SILENT)
        if compiled.is_error():
            raise _refusal(form.noun, compiled.get_error())
        return compiled

    def _bytes(self) -> TokenBytes:
        vocabulary = self._prepared()
        with self._lock:
            if self._token_bytes is None:
                ids = range(self._model.vocab_size)
                self._token_bytes = TokenBytes([vocabulary.decode_bytes([each]) for each in ids])
            return self._token_bytes

    def _prepared(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ModuleNotFoundError:
            raise missing_extra("llguidance", "serve") from None
        ends = list(self._model.eos_token_ids)
        if not ends:
            raise RequestError(
                "the model has no token that ends a text, so a grammar cannot end one either."
            )
        with self._lock:
            if self._vocabulary is None:
                size = self._model.vocab_size
                try:
                    self._vocabulary = LLTokenizer(self._tokenizer.definition, size, ends)
                except ValueError as error:
                    raise RequestError(
                        f"llguidance cannot use the model's tokenizer: {_one_line(str(error))}"
                    ) from error
            return self._vocabulary


def json_rule(schema: Mapping[str, object], strict: bool = False) -> str:
    """Return what stands in a rule of a grammar in Lark for JSON that a schema accepts."""
    return "%json " + json.dumps({**closed(schema, strict=strict), "x-guidance": _OPTIONS})


def _grammar(form: ResponseFormat) -> str:
    """Return a form in llguidance's words. Raises `RequestError`."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.text)
    if form.kind == "calls":
        return LLMatcher.grammar_from_lark(form.text)
    if form.kind == "grammar":
        try:
            return LLMatcher.grammar_from_lark(any_to_lark(form.text))
        except Exception as error:  # the library raises nothing more exact
            raise _refusal(form.noun, f"it is neither Lark nor GBNF ({error})") from None
    try:
        schema = closed(json.loads(form.schema_text), strict=form.strict)
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)
    except RecursionError:
        raise _refusal(form.noun, "it is nested too deeply") from None


class GrammarConstraint:
    """One text under a grammar: a `Constraint`; `ending` takes away what leads on and on."""

    def __init__(self, matcher: LLMatcher, noun: str, ending: JsonEnding | None = None) -> None:
        self._matcher = matcher
        self._noun = noun
        self._ending = ending

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens [V] may come next; once the text is complete, those that end it."""
        bias = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        self._check()
        mask = bias.astype(np.bool_)
        return mask if self._ending is None else self._ending.within(mask)

    def bias(self) -> NDArray[np.float32] | None:
        """Return what is added to logits [V] so that a long text comes to its end."""
        return None if self._ending is None else self._ending.bias()

    def advance(self, token: int) -> None:
        """Take the token that was chosen."""
        self._matcher.consume_token(token)
        self._check()
        if self._ending is not None:
            self._ending.advance(token)

    def _check(self) -> None:
        """A grammar may turn out to be too much work only on the way."""
        if self._matcher.is_error():
            raise RequestError(
                f"the {self._noun} gave up: {_one_line(self._matcher.get_error())}. Simplify it."
            )


def _try_out(grammar: str, noun: str) -> None:
    """Compile a grammar in a process of its own, and raise `RequestError` if it cannot be.

    Raises `RuntimeUnavailableError` where there is no Python to start. A frozen program has none;
    it trusts whoever gives it schemas.
    """
    if getattr(sys, "frozen", False):
        return
    for python in _interpreters():
        outcome = _outcome(python, grammar)
        if outcome is None:
            continue
        if outcome:
            raise _refusal(noun, outcome)
        return
    raise RuntimeUnavailableError(
        f"a {noun} is tried out in a process of its own, and no Python was found for it that has "
        f"llguidance: this program is {sys.executable or 'of no name'!r}. Serve with a Python "
        "interpreter, or ask for any JSON object, which needs no trial."
    )


def _outcome(python: str, grammar: str) -> str | None:
    """Return what is wrong with a grammar, "" for nothing; None if it was not tried."""
    import llguidance

    place = str(Path(llguidance.__file__).parents[1])  # a Python of another start may not know it
    try:
        done = subprocess.run(
            [python, "-P", str(_TRIAL)],
            input=grammar,
            capture_output=True,
            encoding="utf-8",
            timeout=TRIAL_SECONDS,
            env=os.environ | {"PYTHONPATH": place},
        )
    except subprocess.TimeoutExpired:
        return f"compiling it takes more than {TRIAL_SECONDS:g} seconds"
    except OSError:
        return None
    ready, _, found = done.stdout.partition("\n")
    if ready != READY:
        return None
    return "compiling it fails, or takes too much memory" if done.returncode else found.strip()


def _interpreters() -> Iterator[str]:
    """Yield paths of what is this Python, by its name and place; the likeliest first."""
    seen = set[str]()
    for path in _candidates():
        known = path in seen or not _PYTHON.fullmatch(Path(path).name)
        seen.add(path)
        if not known and os.path.isfile(path) and os.access(path, os.X_OK):
            yield path


def _candidates() -> Iterator[str]:
    for path in (sys.executable, getattr(sys, "_base_executable", None)):
        if path:
            yield path
    prefixes = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    folders = [Path(prefix, "bin") for prefix in prefixes]
    folders += map(Path, filter(None, [sysconfig.get_config_var("BINDIR"), *prefixes]))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    end = ".exe" if os.name == "nt" else ""
    for folder in folders:
        for name in (f"python{version}", f"python{sys.version_info.major}", "python"):
            yield str(folder / f"{name}{end}")


def _refusal(noun: str, reason: str) -> RequestError:
    return RequestError(f"the {noun} cannot be kept to: {_one_line(reason)}. Simplify it.")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".")


def behind_reasoning(
    make: MakeConstraint, reasoning: Reasoning, tokenizer: Tokenizer, shown: Sequence[int]
) -> MakeConstraint:
    """Return what leaves the reasoning free and holds the answer as `make` would."""
    return lambda: _Behind(make(), reasoning, tokenizer, shown)


class _Behind:
    """A `Constraint` that begins where the reasoning has ended, or turns out to be none."""

    def __init__(
        self, answer: Constraint, reasoning: Reasoning, tokenizer: Tokenizer, shown: Sequence[int]
    ) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, shown)
        self._parser = ReasoningParser(reasoning)
        self._reasoned = reasoning.begun
        self._waiting: list[int] = []  # tokens that may turn out to be the answer's

    def allowed(self) -> NDArray[np.bool_] | None:
        """Return which tokens [V] may come next; None, for all, while it reasons."""
        return None if self._parser.open else self._answer.allowed()

    def bias(self) -> NDArray[np.float32] | None:
        """Return what brings the answer to its end."""
        if self._parser.open or not isinstance(self._answer, LeaningConstraint):
            return None
        return self._answer.bias()

    def advance(self, token: int) -> None:
        """Take the token that was chosen."""
        if not self._parser.open:
            self._answer.advance(token)
            return
        self._waiting.append(token)
        said = self._parser.push(self._detokenizer.push(token))
        self._reasoned = self._reasoned or self._parser.inside or any(s.reasoned for s in said)
        if self._parser.open:
            return
        if not self._reasoned:
            for each in self._waiting:
                self._answer.advance(each)
            return
        # What one token brought of the answer beside the end of the reasoning.
        rest = "".join(each.text for each in said if not each.reasoned)
        for each in self._tokenizer.encode(rest, special=False) if rest else ():
            mask = self._answer.allowed()
            if mask is None or mask[each]:
                self._answer.advance(each)
