"""What may be asked of a generation: one `Request`, checked before any work is done.

Python, the command line, HTTP and the engine ask with the same fields. Knows the model's shape from
the manifest and the tokenizer; nothing of runtimes or tables.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import wraps
from typing import (
    Annotated,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    get_args,
)

from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.checked_values import check_integer, is_number, wrong_value
from edge_memllm.engine.response_format import ResponseFormat
from edge_memllm.errors import Cancellation, RequestError
from edge_memllm.options import Option, positive_int, signature_of
from edge_memllm.sampling import Constraint, Penalties, Sampling, check_seed, draw_seed
from edge_memllm.text.tokenization import Tokenizer, check_stops
from edge_memllm.text.tools.formats import Tool

Prompt: TypeAlias = str | Sequence[int]

ScoreOf: TypeAlias = Literal["model", "sampling"]

AUTO = "auto"
MAX_NEW_TOKENS = 128  # unless it is said
MOST_DRAFTS = 64
MOST_TOP = 100

_Fields = ParamSpec("_Fields")
_Owner = TypeVar("_Owner")
_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and what is asked of the text that follows it.

    What a door cannot do (`Model.stream` one of the lower fields, an engine `cancellation`) it
    refuses by name.

    Attributes:
        prompt: Text, or token ids.
        max_new_tokens: The most tokens the text may get. An engine takes 0 as well, where only the
            prompt's scores are wanted.
        stop: The text ends before one of these strings; one that is a special token is taken for
            that token.
        stop_token_ids: Tokens that end the text as those of the model do.
        max_tokens: Another name of `max_new_tokens`.
        sampling: How tokens are chosen; None takes the artifact's own way.
        temperature: Of `sampling`, in place of what it says; so do the next three.
        top_p: Only the likeliest tokens that together reach this share; 1 is off.
        top_k: Only so many of the likeliest; 0 is off.
        min_p: Only those with this share of the likeliest one's probability; 0 is off.
        seed: The same one gives the same text; None draws one, and the statistics tell it.
        ignore_eos: Goes on after the model's end of the text, as measurements want.
        speculate: The most draft tokens of one step, copied from earlier in the text and kept as
            far as the model would have chosen them; 0 is off.
        overlays: Names of those to use, in their order; None takes all that are loaded, () none.
        cancellation: Ends the text from another thread, within one token.
        penalties: Changes to the logits of tokens, before they are chosen from.
        constraint: Makes what says, for one text, which tokens may come next.
        response_format: The form the text is held to: a JSON schema, a class of pydantic's, or
            OpenAI's object of type "json_object" or "json_schema"; "regex" and "grammar" (Lark or
            GBNF) hold their text under the same name. Needs the extra serve.
        tools: What a chat may call: functions with type hints and a docstring, OpenAI's objects,
            or `edge_memllm.text.tools.Tool`s.
        tool_choice: Of a chat: "auto", "none", "required", or the name of a tool.
        parallel_tool_calls: Whether a reply of a chat may have several calls; None: where the
            template knows of tools.
        shown_tokens: Special tokens that stand in the text as they are spelt; others are left out.
        without_memory: Computes as if no layer added anything of its memory.
        choices: So many texts, each with random numbers of its own.
        top: Gives every token its score, and so many likeliest ones with theirs; None gives none.
        top_of: Whose scores: "model" is before temperature, penalties, biases and constraints;
            "sampling" is what the token was drawn from, after all of them.
        score_prompt: Scores the prompt's tokens as well.
        cache_prompt: Starts behind the beginning of the prompt, where the keys and values of that
            are there; False computes all of it.
        progress: Tells how much of the prompt is computed, before its first chunk and after each.
        trace: Tells where each token's record came from.
        client: Whose request it is; clients take turns.
        timeout: Seconds after which it is given up, from when it is submitted or from `since`.
        since: When `timeout` begins, on the clock `time.monotonic`.
    """

    prompt: Prompt
    _: KW_ONLY
    max_new_tokens: Annotated[
        int, Option("stop after N tokens at the latest", parse=positive_int)
    ] = MAX_NEW_TOKENS
    stop: Annotated[
        str | Sequence[str],
        Option("stop before this text; may be repeated", "TEXT", parse=str, several="repeated"),
    ] = ()
    stop_token_ids: Annotated[
        Sequence[int],
        Option(
            "stop at this token as well; may be repeated",
            parse=int,
            several="repeated",
            flag="--stop-token-id",
        ),
    ] = ()
    max_tokens: int | None = None
    sampling: Sampling | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: Annotated[
        int | None,
        Option(
            "same seed, same text", unset="drawn, and shown with the statistics", group="sampling"
        ),
    ] = None
    ignore_eos: bool = False
    speculate: Annotated[
        int,
        Option(
            "copy up to N tokens at a time from earlier in the text and keep those the model would "
            "have chosen: faster where the text repeats itself (default: %(default)s, off)"
        ),
    ] = 0
    overlays: Sequence[str] | None = None
    cancellation: Cancellation | None = None
    penalties: Penalties | None = None
    constraint: Callable[[], Constraint] | None = None
    response_format: ResponseFormat | Mapping[str, Any] | type | None = None
    tools: Sequence[Tool | Mapping[str, Any] | Callable[..., Any]] = ()
    tool_choice: Literal["auto", "none", "required"] | str = AUTO
    parallel_tool_calls: bool | None = None
    shown_tokens: Sequence[int] = ()
    without_memory: bool = False
    choices: int = 1
    top: int | None = None
    top_of: ScoreOf = "model"
    score_prompt: bool = False
    cache_prompt: bool = True
    progress: bool = False
    trace: bool = False
    client: str = ""
    timeout: float | None = None
    since: float | None = None


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that can be done: what the loop of one text and the engine both run."""

    request: Request
    prompt: list[int]  # at least one token
    limit: int  # tokens that each text may get
    stops: tuple[str, ...]
    ends: frozenset[int]  # tokens that end a text
    sampling: Sampling
    seed: int


def check_request(
    request: Request,
    prompt: list[int],
    tokenizer: Tokenizer,
    model: ModelSpec,
    default: Sampling,
    fewest: int = 1,
) -> CheckedRequest:
    """Return the request with all that follows from it and the ids of its prompt.

    `default` is how tokens are chosen where it does not say; at least `fewest` must be asked for.
    Raises `RequestError` if it cannot be
    done.
    """
    stops = check_stops(request.stop)
    check_speculate(request.speculate)
    check_positive("choices", request.choices)
    if request.top is not None:
        check_integer("top", request.top, 0, MOST_TOP)
    if request.top_of not in get_args(ScoreOf):
        raise wrong_value("top_of", request.top_of, "'model' or 'sampling'")
    if request.penalties is not None:
        _check_bias(request.penalties, model.vocab_size)
    if request.timeout is not None:
        _check_timeout(request.timeout)
    _check_shown(request.shown_tokens, model.vocab_size)
    if request.without_memory:
        _check_memory(request.overlays, model)
    return CheckedRequest(
        request=request,
        prompt=prompt,
        limit=token_limit(
            _asked_tokens(request), len(prompt), model.max_position_embeddings, fewest
        ),
        stops=stops,
        ends=ending_tokens(
            stops, request.stop_token_ids, tokenizer, model, ignore_eos=request.ignore_eos
        ),
        sampling=_sampling(request, default),
        seed=draw_seed() if request.seed is None else check_seed(request.seed),
    )


def _sampling(request: Request, default: Sampling) -> Sampling:
    """Return how tokens are chosen: as `sampling` says, but for what is given beside it."""
    sampling = default if request.sampling is None else request.sampling
    named = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    given = {name: value for name, value in named.items() if value is not None}
    return replace(sampling, **given) if given else sampling


def _asked_tokens(request: Request) -> int:
    """Return the limit, under whichever of its names it was given."""
    asked, other = request.max_new_tokens, request.max_tokens
    if other is None:
        return asked
    check_positive("max_tokens", other)
    if asked not in (other, MAX_NEW_TOKENS):
        raise RequestError(
            f"max_new_tokens is {asked} and max_tokens is {other}: both are the most tokens the "
            "text may get. Give one of them."
        )
    return other


_NOT_HERE = ": one text alone has none of that. Submit the request to an edge_memllm.engine.Engine."
ENGINE_ONLY: Mapping[str, str] = dict.fromkeys(
    ("choices", "score_prompt", "cache_prompt", "progress", "trace", "client", "timeout", "since"),
    _NOT_HERE,
)
CHAT_ONLY: Mapping[str, str] = dict.fromkeys(
    ("tools", "tool_choice", "parallel_tool_calls"),
    ": tools are for chats. Ask with chat or stream_chat.",
)
CANCELLED_BY_TASK: Mapping[str, str] = {
    "cancellation": ": a stream of asyncio ends with its task. Cancel that, or close the iterator."
}


def refuse_fields(request: Request, reasons: Mapping[str, str]) -> None:
    """Raise `RequestError` for the first field that is asked for although there is a reason not to.

    A reason goes on where "NAME is VALUE" ends.
    """
    for field in fields(request):
        value = getattr(request, field.name)
        if field.name in reasons and value != field.default:
            raise RequestError(f"{field.name} is {value!r:.80}{reasons[field.name]}")


def asked_by(
    ask: Callable[_Fields, _Asked],
) -> Callable[
    [Callable[[_Owner, _Asked], _Answer]], Callable[Concatenate[_Owner, _Fields], _Answer]
]:
    """Return a decorator: the method gets what `ask` returns, its callers give what `ask` takes.

    So the fields of a request, their types, their defaults and what they mean stand in `Request`
    alone, and `help` shows them with the method.
    """

    def decorated(
        method: Callable[[_Owner, _Asked], _Answer],
    ) -> Callable[Concatenate[_Owner, _Fields], _Answer]:
        def call(owner: _Owner, /, *given: _Fields.args, **named: _Fields.kwargs) -> _Answer:
            return method(owner, ask(*given, **named))

        found = wraps(method)(call)
        own, taken = inspect.signature(method), signature_of(ask)
        parameters = [next(iter(own.parameters.values())), *taken.parameters.values()]
        found.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        found.__doc__ = f"{inspect.getdoc(method) or ''}\n\nArgs:\n{_meanings(taken.parameters)}"
        return call

    return decorated


def _meanings(names: Iterable[str]) -> str:
    """Return what `Request` says of some of its fields, indented as there."""
    _, _, said = (inspect.getdoc(Request) or "").partition("Attributes:\n")
    entries = re.split(r"^(?=    \w+:)", said, flags=re.MULTILINE)
    wanted = tuple(f"    {name}:" for name in names)
    return "".join(entry for entry in entries if entry.startswith(wanted))


def going_on(
    ask: Callable[Concatenate[Prompt, _Fields], Request],
) -> Callable[_Fields, Request]:
    """Return what asks without a prompt: there is a text already."""

    def asked(*given: _Fields.args, **named: _Fields.kwargs) -> Request:
        return ask((), *given, **named)

    taken = inspect.signature(ask)
    parameters = list(taken.parameters.values())[1:]
    asked.__signature__ = taken.replace(parameters=parameters)  # type: ignore[attr-defined]
    return asked


def for_each(
    ask: Callable[Concatenate[Prompt, _Fields], Request],
) -> Callable[Concatenate[list[str] | list[list[int]], _Fields], Request]:
    """Return what asks the same of each prompt of a list."""
    return ask  # type: ignore[return-value]  # the method finds out what it was given


def check_tokens(ids: Iterable[object], vocab_size: int) -> list[int]:
    """Return the ids as plain integers; raises `RequestError` for what is not in the vocabulary.

    A bool or a float is not a token id, whatever its value.
    """
    return [_check_token(position, token, vocab_size) for position, token in enumerate(ids)]


def _check_token(position: int, token: object, vocab_size: int) -> int:
    try:
        number = -1 if isinstance(token, bool) else operator.index(token)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < vocab_size:
        found = repr(token) if number.bit_length() < 64 else "a huge integer"
        raise RequestError(
            f"token {position} is {found:.80}, expected an integer from 0 to {vocab_size - 1}."
        )
    return number


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer, model: ModelSpec) -> list[int]:
    """Return the ids of a prompt that fits the context; text is tokenized, ids are checked.

    An empty prompt becomes the token that starts a text, or else the one that ends it.
    Raises `RequestError`.
    """
    ids = text_tokens(prompt, tokenizer, model)
    if len(ids) > model.max_position_embeddings:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and the model's context holds "
            f"{model.max_position_embeddings}. Shorten the prompt."
        )
    if ids:
        return ids
    start = start_token(model)
    if start is None:
        raise RequestError(
            "the prompt is empty and the model has no token that starts a text. Give a prompt."
        )
    return [start]


def text_tokens(
    text: Prompt, tokenizer: Tokenizer, model: ModelSpec, *, special: bool = True
) -> list[int]:
    """Return the ids of text, or checked ids, however many; `special` as in `Tokenizer.encode`.

    Raises `RequestError`.
    """
    if isinstance(text, bytes) or not isinstance(text, Iterable):
        raise RequestError(f"the prompt is a {type(text).__name__}, expected text or token ids.")
    tokens = tokenizer.encode(text, special=special) if isinstance(text, str) else text
    return check_tokens(tokens, model.vocab_size)


def ending_tokens(
    stops: Iterable[str],
    stop_token_ids: Iterable[object],
    tokenizer: Tokenizer,
    model: ModelSpec,
    *,
    ignore_eos: bool,
) -> frozenset[int]:
    """Return the tokens that end a text: the model's own, unless ignored, and those asked for.

    A stop string that is one special token is that token: it never stands in the text. Raises
    `RequestError` for ids that are not in the vocabulary.
    """
    try:
        asked = check_tokens(stop_token_ids, model.vocab_size)
    except RequestError as error:
        raise RequestError(f"stop_token_ids: {error}") from None
    special = (tokenizer.special_token(text) for text in stops)
    found = {token for token in special if token is not None and token < model.vocab_size}
    return frozenset((*asked, *found, *(() if ignore_eos else model.eos_token_ids)))


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many elements two sequences have in common from the front."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(place for place in range(shorter) if first[place] != second[place])


def start_token(model: ModelSpec) -> int | None:
    """Return the token a text starts from: the one for that, or one that ends the text before."""
    if model.bos_token_id is not None:
        return model.bos_token_id
    return model.eos_token_ids[0] if model.eos_token_ids else None


def token_limit(max_new_tokens: object, prompt_length: int, context: int, fewest: int = 1) -> int:
    """Return how many tokens may be chosen: as many as asked for, or as fit the context.

    At least `fewest` must be asked for. The last token chosen is never fed, so it needs no place.
    Raises `RequestError`.
    """
    asked = check_integer("max_new_tokens", max_new_tokens, fewest)
    return min(asked, context - prompt_length + 1)


def check_positive(name: str, value: object) -> int:
    """Return `value` if it is an integer of at least 1, else raise `RequestError`."""
    return check_integer(name, value, 1)


def check_speculate(value: object) -> int:
    """Return `value` if it is a number of draft tokens a step may have, else `RequestError`."""
    return check_integer("speculate", value, 0, MOST_DRAFTS)


def _check_shown(tokens: Sequence[int], vocab_size: int) -> None:
    try:
        check_tokens(tokens, vocab_size)
    except RequestError as error:
        raise RequestError(f"shown_tokens: {error}") from None


def _check_bias(penalties: Penalties, vocab_size: int) -> None:
    try:
        check_tokens(penalties.logit_bias, vocab_size)
    except RequestError as error:
        raise RequestError(f"logit_bias: {error}") from None


def _check_memory(overlays: Sequence[str] | None, model: ModelSpec) -> None:
    if not model.memory.layers:
        raise RequestError(
            "without_memory is true, and this model has no token memory (dense): there is none to "
            "do without. Leave it out."
        )
    if overlays:
        raise RequestError(
            f"without_memory is true, and overlays are {', '.join(overlays)}: they change a memory "
            "that is off. Leave one of the two out."
        )


def _check_timeout(timeout: object) -> None:
    if not is_number(timeout) or timeout <= 0:
        raise wrong_value("timeout", timeout, "seconds above 0")
