"""One request, understood: what is asked of the engine, and how the reply is to be written.

Completions and chat are read here, with the fields they share, messages, and prompts, which are
made token ids and measured. Knows no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from edge_memllm.engine.grammar import MakeConstraint
from edge_memllm.engine.request import MOST_DRAFTS, Request, check_tokens
from edge_memllm.engine.tool_use import ToolUse
from edge_memllm.model import Model
from edge_memllm.sampling import MOST_PENALTY, SEED_LIMIT, Penalties, Sampling
from edge_memllm.server.fields import (
    ApiError,
    BodyFields,
    blaming,
    checked_text,
    refused,
    shown,
)
from edge_memllm.server.forms import WantedForm, take_form
from edge_memllm.server.messages import (
    MOST_NAME,
    Chat,
    take_choice,
    take_continued,
    take_messages,
    take_parallel,
    take_thinking,
    take_tools,
    take_variables,
    template_of,
    tool_use,
)
from edge_memllm.server.parameters import not_honoured, nothing_of
from edge_memllm.server.protocols.biases import take_biases
from edge_memllm.server.protocols.keep_alive import take_keep_alive
from edge_memllm.server.service import Service
from edge_memllm.server.settings import Limits
from edge_memllm.text.long_text import BLOCK, tokens_beyond
from edge_memllm.text.reasoning import Reasoning, reasoning_of
from edge_memllm.text.tokenization import MAX_STOP_CHARACTERS, Tokenizer

MOST_TEMPERATURE = 2.0
MOST_REPETITION = 10.0
_MOST_SLOT = 1 << 16
MOST_USER = 256
_MOST_METADATA, _MOST_METADATA_TEXT = 16, 512
_STREAM_UNSUPPORTED = nothing_of("events are not padded", include_obfuscation=(False,))
# OpenAI's top_p may be 0, which keeps the likeliest token alone.
_LEAST_TOP_P = 1e-9
_SEED_LOW, _SEED_HIGH = -(1 << 63), SEED_LIMIT - 1

# Shorter texts are tokenized in less time than it would take to say how long they are.
_SHORT = 4096

MOST_TOP = 20
_CHAT_UNSUPPORTED = not_honoured("chat")

# OpenAI's default.
MAX_TOKENS = 16
_COMPLETION_UNSUPPORTED = not_honoured("completions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A whole request: its prompts as token ids, what is asked of each, and how replies look."""

    request: Request  # of every prompt, which is not in it
    prompts: Sequence[Sequence[int]] = ()
    echo: Sequence[str] | None = None  # the texts of the prompts, where replies begin with them
    form: WantedForm | None
    tools: ToolUse | None = None
    reasoning: Reasoning | None = None  # how that is told apart from the answer, where it is
    stream: bool
    usage: bool = False  # at the end of a stream
    running_usage: bool = False  # with each of its parts
    statistics: bool = False
    progress: bool = False  # of the prompt, told in a stream
    timings: bool = False  # with each part of a stream
    verbose: bool = False  # tells the prompt's text, and how tokens were chosen
    user: str = ""
    keep_alive: float | None = None  # seconds that the model stays afterwards, if that was said
    repeated: Mapping[str, Any] = field(default_factory=dict)  # of the request, in the reply

    def requests(
        self,
        client: str,
        timeout: float | None = None,
        since: float | None = None,
        constraint: MakeConstraint | None = None,
    ) -> list[Request]:
        """Return what the engine is asked for, one request for each prompt.

        `constraint` is what was made of `form` and `tools`; the rest is as in `Request`.
        """
        asked = replace(
            self.request,
            client=f"{client}/{self.user}" if self.user else client,
            timeout=timeout,
            since=since,
            constraint=constraint,
        )
        return [replace(asked, prompt=prompt) for prompt in self.prompts]


def read_completion(fields: BodyFields, service: Service) -> Call:
    """Return the call that an object stands for. Raises `ApiError`."""
    limits = service.settings.limits
    service.check_model(fields)
    call = take_call(fields, service)
    choices = call.request.choices
    _check_best_of(fields, choices)
    prompts = take_prompts(fields, limits.choices // choices, limits)
    most = service.most_tokens
    given = _take_limit(fields, ("max_tokens", "n_predict"), 0, most)
    top = _take_completion_top(fields)
    echo = fields.flag("echo")
    fields.finish(_COMPLETION_UNSUPPORTED)
    ids = [encoded(each, service) for each in prompts]
    request = replace(
        call.request,
        max_new_tokens=min(MAX_TOKENS, most) if given is None else given,
        top=top,
        score_prompt=echo and top is not None,
    )
    texts = [*map(partial(_prompt_text, service), prompts, ids)] if echo else None
    return replace(call, request=request, prompts=ids, echo=texts)


def _take_completion_top(fields: BodyFields) -> int | None:
    """Take how many likeliest tokens to tell; false, which is chat's word, tells nothing."""
    if fields.peek("logprobs") is False:
        fields.value("logprobs")
    return fields.optional_integer("logprobs", 0, MOST_TOP)


def _check_best_of(fields: BodyFields, choices: int) -> None:
    best_of = fields.optional_integer("best_of", 0, 1 << 31)
    if best_of is not None and best_of != choices:
        raise refused(
            "best_of",
            f"best_of is {best_of} and n is {choices}: this server does not choose among replies. "
            "Leave best_of out, or ask for n replies with logprobs and choose yourself.",
            "unsupported_parameter",
        )


def _prompt_text(service: Service, prompt: Prompt, ids: list[int]) -> str:
    """Return what a reply that repeats its prompt begins with."""
    given = prompt.value
    return given if isinstance(given, str) else service.model.tokenizer.decode(ids)


def read_chat(fields: BodyFields, service: Service) -> Call:
    """Return the call that an object stands for. Raises `ApiError`."""
    limits = service.settings.limits
    service.check_model(fields)
    messages = take_messages(fields, limits)
    tools, choice = take_tools(fields, limits), take_choice(fields)
    parallel = take_parallel(fields, service)
    continued = take_continued(fields, messages)
    variables = {**take_thinking(fields, service), **take_variables(fields)}
    reasons = take_reasoning_format(fields)
    call = take_call(fields, service)
    top = _take_top(fields)
    max_tokens = _take_max_tokens(fields, service.most_tokens)
    fields.finish(_CHAT_UNSUPPORTED)
    call = replace(call, request=replace(call.request, top=top))
    answer = answer_of(call.form) if tools else None
    use = tool_use(tools, choice, service, parallel=parallel, answer=answer)
    offered = () if choice.need is None else tools
    chat = Chat(messages, offered, continued, variables=variables, reasons=reasons)
    return with_chat(call, chat, use, max_tokens, service)


def take_reasoning_format(fields: BodyFields) -> bool:
    """Take whether reasoning is told apart from the answer, in llama.cpp's words."""
    value, where = fields.value("reasoning_format"), fields.param("reasoning_format")
    if value not in (None, "none", "auto", "deepseek"):
        raise refused(where, f"{where} is {shown(value)}, expected none, auto or deepseek.")
    return value != "none"


def with_chat(
    call: Call,
    chat: Chat,
    use: ToolUse | None,
    max_tokens: int | None,
    service: Service,
    param: str = "messages",
) -> Call:
    """Return a call with the prompt that a conversation makes, and the tools of its reply.

    `param` is the field at fault where it does not fit.
    """
    context, tokenizer = service.spec.max_position_embeddings, service.model.tokenizer
    most = max_tokens or min(service.most_tokens, context)
    prompt = chat.prompt(service, param)
    with blaming(param):
        ids = encoded_text(prompt, service, param, special=False)
    request, shown = replace(call.request, max_new_tokens=most), set[int]()
    reasoning = reasoning_of(template_of(service).source, prompt) if chat.reasons else None
    if reasoning is not None:
        shown |= {*filter(None, map(tokenizer.special_token, reasoning.marks))}
    if use is not None:
        shown |= {*use.shown_tokens(tokenizer)}
        ends = (*request.stop_token_ids, *use.ends(tokenizer))
        request = replace(request, stop_token_ids=ends)
    request = replace(request, shown_tokens=tuple(sorted(shown)))
    return replace(call, request=request, prompts=[ids], tools=use, reasoning=reasoning)


def answer_of(wanted: WantedForm | None) -> Mapping[str, Any] | None:
    """Return the schema of an answer that may come in place of calls; None where it is free."""
    if wanted is None:
        return None
    if not wanted.form.is_json:
        message = f"{wanted.where} and tools are both given: beside calls an answer is JSON alone."
        raise refused(wanted.where, f"{message} Leave one of them out.", "unsupported_parameter")
    schema: Mapping[str, Any] = json.loads(wanted.form.schema_text)
    return schema


def _take_top(fields: BodyFields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.optional_integer("top_logprobs", 0, MOST_TOP)
    if top and not wanted:
        where = fields.param("top_logprobs")
        raise refused(where, f"{where} needs logprobs true. Add it, or leave {where} out.")
    return (top or 0) if wanted else None


def _take_max_tokens(fields: BodyFields, most: int) -> int | None:
    """Take the limit under its new name, its old one or llama.cpp's."""
    return _take_limit(fields, ("max_completion_tokens", "max_tokens", "n_predict"), 1, most)


def _take_limit(fields: BodyFields, names: Sequence[str], least: int, most: int) -> int | None:
    """Take a limit of tokens that goes by several names; -1 of llama.cpp's is none."""
    if fields.peek("n_predict") == -1:
        fields.value("n_predict")
    given = {name: fields.optional_integer(name, least, most) for name in names}
    found = {name: value for name, value in given.items() if value is not None}
    if len({*found.values()}) > 1:
        (first, value), (second, other) = [*found.items()][:2]
        raise refused(first, f"{first} is {value} and {second} is {other}. Give one of them.")
    return next(iter(found.values()), None)


def take_call(fields: BodyFields, service: Service, *, words: Tokenizer | None = None) -> Call:
    """Take what completions and chat have in common; prompts and their limits are to follow.

    With `words` a bias may name tokens by their text, as in llama.cpp.

    Raises `ApiError` for the first field that cannot be granted.
    """
    stream = fields.flag("stream")
    usage, running = _take_usage(fields, stream)
    take_hints(fields)
    limits = service.settings.limits
    form = take_form(fields, limits.schema_bytes)
    choices = _or(fields.optional_integer("n", 1, limits.choices), 1)
    request = take_request(fields, service, words=words)
    progress, timings = take_telling(fields)
    fields.optional_integer("id_slot", -1, _MOST_SLOT)
    return Call(
        request=replace(
            request,
            choices=choices,
            trace=fields.flag("trace"),
            cache_prompt=fields.flag("cache_prompt", default=True),
            progress=progress or timings,
        ),
        progress=progress,
        timings=timings,
        verbose=fields.flag("verbose"),
        form=form,
        stream=stream,
        usage=usage,
        running_usage=running,
        statistics=fields.flag("statistics"),
        user=take_user(fields),
        keep_alive=take_keep_alive(fields),
    )


def take_telling(fields: BodyFields) -> tuple[bool, bool]:
    """Take whether a stream tells how far its prompt is, and times with each of its parts."""
    return fields.flag("return_progress"), fields.flag("timings_per_token")


def take_request(
    fields: BodyFields,
    service: Service,
    stop: str = "stop",
    *,
    words: Tokenizer | None = None,
) -> Request:
    """Take how tokens are chosen, and what ends a reply; the field for texts is called `stop`."""
    model, settings, limits = service.model, service.settings, service.settings.limits
    seed = fields.optional_integer("seed", _SEED_LOW, _SEED_HIGH)
    return Request(
        prompt=(),
        seed=settings.seed if seed is None else seed % SEED_LIMIT,
        speculate=_or(_take_drafts(fields), settings.speculate),
        sampling=_take_sampling(fields, model.sampling),
        penalties=_take_penalties(fields, model.manifest.model.vocab_size, limits.biases, words),
        stop=_take_stops(fields, stop, limits.stops),
        stop_token_ids=_take_stop_tokens(fields, limits.stops, model),
        ignore_eos=fields.flag("ignore_eos"),
        overlays=_take_overlays(fields, model.overlays, limits.overlays),
        without_memory=fields.flag("without_memory"),
    )


def _take_drafts(fields: BodyFields) -> int | None:
    """Take how many drafts a step may have, under its name or llama.cpp's."""
    names = ("speculate", "speculative.n_max")
    first, second = (fields.optional_integer(each, 0, MOST_DRAFTS) for each in names)
    if None not in (first, second) and first != second:
        where = fields.param(names[0])
        raise refused(where, f"{names[0]} is {first} and {names[1]} is {second}. Give one of them.")
    return second if first is None else first


def _take_sampling(fields: BodyFields, default: Sampling) -> Sampling:
    """Take how tokens are chosen; what is left out comes from the artifact."""
    top_p = fields.optional_number("top_p", 0, 1)
    top_k = fields.optional_integer("top_k", -1, 1 << 31)  # -1 is vLLM's word for all
    given: dict[str, Any] = {
        "temperature": fields.optional_number("temperature", 0, MOST_TEMPERATURE),
        "top_p": None if top_p is None else max(top_p, _LEAST_TOP_P),
        "top_k": None if top_k is None else max(top_k, 0),
        "min_p": fields.optional_number("min_p", 0, 1),
        "repetition_penalty": _take_repetition(fields),
    }
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def _take_repetition(fields: BodyFields) -> float | None:
    """Take the penalty of what is there already, under its name or llama.cpp's."""
    name, other = "repetition_penalty", "repeat_penalty"
    first, second = (fields.optional_number(each, 0.01, MOST_REPETITION) for each in (name, other))
    if None not in (first, second) and first != second:
        raise refused(other, f"{name} is {first:g} and {other} is {second:g}. Give one of them.")
    return second if first is None else first


def _take_penalties(
    fields: BodyFields, vocab_size: int, most: int, words: Tokenizer | None
) -> Penalties:
    frequency, presence = (
        fields.optional_number(name, -MOST_PENALTY, MOST_PENALTY) or 0.0
        for name in ("frequency_penalty", "presence_penalty")
    )
    return Penalties(frequency, presence, take_biases(fields, vocab_size, most, words))


def _take_stops(fields: BodyFields, name: str, most: int) -> tuple[str, ...]:
    value = fields.value(name)
    where = fields.param(name)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > most:
        raise refused(where, f"{where} is {shown(value)}, expected a text or at most {most}.")
    stops = tuple(
        checked_text(each, f"{where}[{number}]", MAX_STOP_CHARACTERS)
        for number, each in enumerate(texts)
    )
    if "" in stops:
        raise refused(where, f"{where} has an empty text, which would stop every reply.")
    return stops


def _take_stop_tokens(fields: BodyFields, most: int, model: Model) -> tuple[int, ...]:
    tokens = fields.optional_items("stop_token_ids", most) or []
    with blaming(fields.param("stop_token_ids")):
        return tuple(check_tokens(tokens, model.manifest.model.vocab_size))


def _take_overlays(
    fields: BodyFields, loaded: tuple[str, ...], most: int
) -> tuple[str, ...] | None:
    names = fields.optional_items("overlays", most)
    if names is None:
        return None
    where = fields.param("overlays")
    chosen = tuple(checked_text(each, where, MOST_NAME) for each in names)
    unknown = [name for name in chosen if name not in loaded]
    if unknown:
        there = ", ".join(loaded) or "none"
        raise refused(where, f"There is no overlay {shown(unknown[0])}. Loaded: {there}.")
    if len(set(chosen)) < len(chosen):
        raise refused(where, f"{where} names an overlay twice.")
    return chosen


def _take_usage(fields: BodyFields, stream: bool) -> tuple[bool, bool]:
    """Take whether a stream tells its usage at its end, and whether with each part as well."""
    options = fields.group("stream_options")
    if options is None:
        return False, False
    usage, running = options.flag("include_usage"), options.flag("continuous_usage_stats")
    options.finish(_STREAM_UNSUPPORTED)
    where = fields.param("stream_options")
    if usage and not stream:
        raise refused(where, f"{where} is for streams. Ask with stream true, or leave it out.")
    if running and not usage:
        message = f"{where}.continuous_usage_stats needs include_usage true. Add it."
        raise refused(f"{where}.continuous_usage_stats", message)
    return usage, running


def take_user(fields: BodyFields) -> str:
    """Take who asks, under either of OpenAI's names: users of one client take turns."""
    names = (fields.bounded_text(name, MOST_USER) for name in ("user", "safety_identifier"))
    return "/".join(name for name in names if name)


def take_hints(fields: BodyFields) -> None:
    """Take what may be said of a request and changes nothing about its reply."""
    fields.bounded_text("prompt_cache_key", MOST_USER)
    pairs = fields.pairs("metadata", _MOST_METADATA)
    where = fields.param("metadata")
    for name, value in pairs.items():
        checked_text(value, f"{where}.{name}", _MOST_METADATA_TEXT)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


class Prompt(NamedTuple):
    """One prompt as it was given, and where in the request it stands."""

    value: str | list[object]
    where: str


def take_prompts(fields: BodyFields, most: int, limits: Limits) -> list[Prompt]:
    """Take the field `prompt`: at most `most` texts or lists of ids, not looked into yet."""
    value, where = fields.required("prompt"), fields.param("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and _is_number(value[0])):
        return [_checked(value, where, limits)]
    if not isinstance(value, list) or not value:
        expected = "a text, a list of token ids, or a list of those"
        raise refused(where, f"{where} is {shown(value)}, expected {expected}.")
    if len(value) > most:
        raise refused(
            where,
            f"{where} holds {len(value)} prompts, expected at most {most}: a request may have "
            f"{limits.choices} replies, n for each prompt.",
        )
    return [_checked(each, f"{where}[{number}]", limits) for number, each in enumerate(value)]


def _checked(value: object, where: str, limits: Limits) -> Prompt:
    if isinstance(value, list):
        if not value:
            raise refused(where, f"{where} is a list of no tokens, expected one at least.")
        return Prompt(value, where)
    return Prompt(checked_text(value, where, limits.body_bytes), where)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def encoded(prompt: Prompt, service: Service) -> list[int]:
    """Return the ids of a prompt. Raises `ApiError` for one that does not fit the context."""
    value, where = prompt
    if isinstance(value, str):
        return encoded_text(value, service, where)
    check_length(len(value), service, where)
    with blaming(where):
        return check_tokens(value, service.spec.vocab_size)


def encoded_text(text: str, service: Service, where: str, *, special: bool = True) -> list[int]:
    """Return the ids of a text; what cannot fit is refused before, or while, it is tokenized."""
    tokenizer = service.model.tokenizer
    if len(text) > _SHORT:
        check_length(service.token_bound.fewest(len(text)), service, where, least=True)
    if len(text) > BLOCK:
        beyond = tokens_beyond(tokenizer, text, _room(service))
        check_length(beyond or 0, service, where, least=True)
    ids = tokenizer.encode(text, special=special)
    check_length(len(ids), service, where)
    return ids


def _room(service: Service) -> int:
    """Return how many tokens a prompt may have."""
    context, limit = service.spec.max_position_embeddings, service.settings.limits.prompt_tokens
    return context if limit is None else min(context, limit)


def check_length(length: int, service: Service, where: str, *, least: bool = False) -> None:
    """Refuse what is too long.

    In words that clients look for, so that they know to shorten it: litellm for the first half
    sentence, langchain-openai for "prompt is too long", those of llama.cpp for what it exceeds.
    """
    room, context = _room(service), service.spec.max_position_embeddings
    if length <= room:
        return
    own = "" if room == context else f", and this server takes prompts of at most {room}"
    what, it = ("messages", "your messages") if where == "messages" else ("prompt", "it")
    raise ApiError(
        400,
        f"This model's maximum context length is {context} tokens{own}. However, your prompt is "
        f"too long: {it} resulted in {'at least ' if least else ''}{length} tokens, which exceeds "
        f"the available context size. Please reduce the length of the {what}.",
        code="context_length_exceeded",
        param=where,
        kind="exceed_context_size_error",
        facts={"n_prompt_tokens": length, "n_ctx": context},
    )
