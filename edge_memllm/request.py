"""What may be asked of a model: prompts and limits, checked before any work is done.

Knows the model's shape from the manifest and the tokenizer; nothing of runtimes or tables.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

from edge_memllm.artifact.manifest import ModelSpec
from edge_memllm.checked_values import check_integer, is_number, wrong_value
from edge_memllm.errors import Cancellation, RequestError
from edge_memllm.sampling import Constraint, Sampling, Steering, check_seed, draw_seed
from edge_memllm.text.tokenization import Tokenizer, check_stops

Prompt: TypeAlias = str | Sequence[int]

MOST_DRAFTS = 64

MOST_TOP = 100


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


def token_limit(max_new_tokens: object, prompt_length: int, context: int) -> int:
    """Return how many tokens may be chosen: as many as asked for, or as fit the context.

    The last token chosen is never fed, so it needs no place. Raises `RequestError`.
    """
    return min(check_positive("max_new_tokens", max_new_tokens), context - prompt_length + 1)


def check_positive(name: str, value: object) -> int:
    """Return `value` if it is an integer of at least 1, else raise `RequestError`."""
    return check_integer(name, value, 1)


def check_speculate(value: object) -> int:
    """Return `value` if it is a number of draft tokens a step may have, else `RequestError`."""
    return check_integer("speculate", value, 0, MOST_DRAFTS)


class TextOptions(TypedDict, total=False):
    """For going on with a text."""

    max_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    sampling: Sampling | None
    ignore_eos: bool
    speculate: int


class PromptOptions(TextOptions, total=False):
    """For a prompt."""

    seed: int | None
    overlays: Sequence[str] | None


class CancellableTextOptions(TextOptions, total=False):
    """For going on with a text, with a way to end that."""

    cancellation: Cancellation | None


class CancellablePromptOptions(PromptOptions, total=False):
    """For a prompt, with a way to end that."""

    cancellation: Cancellation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what is wished for; what a field shares with `Model.stream` means the same.

    `max_new_tokens` may be 0 where only the prompt's scores are wanted. `choices` replies are
    drawn, each with random numbers of its own, as `Model.generate` draws them for equal prompts.
    `stop_token_ids` end a text as those of the model do, which `ignore_eos` passes over.
    `constraint` makes one constraint for each choice. `top` gives every token its score and that
    many likeliest ones, None gives none; `score_prompt` scores the prompt's tokens as well.
    `client` is whose request it is: clients take turns. After `timeout` seconds it is given up:
    from when it is submitted, or from `since` on the clock `time.monotonic`. `overlays` are looked
    up when it is submitted, and kept. `without_memory` computes as if the memory of all layers
    were zero.
    `trace` tells where each token's record came from.
    """

    prompt: Prompt
    max_new_tokens: int = 128
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    sampling: Sampling | None = None
    steering: Steering | None = None
    constraint: Callable[[], Constraint] | None = None
    seed: int | None = None
    ignore_eos: bool = False
    choices: int = 1
    top: int | None = None
    score_prompt: bool = False
    overlays: Sequence[str] | None = None
    without_memory: bool = False
    trace: bool = False
    client: str = ""
    timeout: float | None = None
    since: float | None = None


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that can be done."""

    wish: Request
    prompt: list[int]
    limit: int  # tokens that each choice may get
    stops: tuple[str, ...]
    sampling: Sampling
    seed: int
    top: int  # likeliest tokens of each score
    ends: frozenset[int]

    @property
    def scored(self) -> bool:
        """Whether tokens get scores."""
        return self.wish.top is not None


def check_request(
    wish: Request, tokenizer: Tokenizer, model: ModelSpec, default: Sampling, most_choices: int
) -> CheckedRequest:
    """Return the request with its prompt as tokens; raises `RequestError` if it cannot be done."""
    prompt = prompt_tokens(wish.prompt, tokenizer, model)
    stops = check_stops(wish.stop)
    if check_positive("choices", wish.choices) > most_choices:
        raise RequestError(
            f"choices is {wish.choices}, expected at most {most_choices}: as many as may wait."
        )
    if wish.steering is not None:
        _check_bias(wish.steering, model.vocab_size)
    if wish.timeout is not None:
        _check_timeout(wish.timeout)
    if wish.without_memory:
        _check_memory(wish.overlays, model)
    return CheckedRequest(
        wish=wish,
        prompt=prompt,
        limit=_limit(wish.max_new_tokens, len(prompt), model.max_position_embeddings),
        stops=stops,
        sampling=default if wish.sampling is None else wish.sampling,
        seed=draw_seed() if wish.seed is None else check_seed(wish.seed),
        top=_check_top(wish.top),
        ends=ending_tokens(
            stops, wish.stop_token_ids, tokenizer, model, ignore_eos=wish.ignore_eos
        ),
    )


def _limit(max_new_tokens: object, prompt_length: int, context: int) -> int:
    if max_new_tokens == 0 and isinstance(max_new_tokens, int) and max_new_tokens is not False:
        return 0
    return token_limit(max_new_tokens, prompt_length, context)


def _check_bias(steering: Steering, vocab_size: int) -> None:
    try:
        check_tokens(steering.logit_bias, vocab_size)
    except RequestError as error:
        raise RequestError(f"logit_bias: {error}") from None


def _check_top(top: object) -> int:
    return 0 if top is None else check_integer("top", top, 0, MOST_TOP)


def _check_memory(overlays: Sequence[str] | None, model: ModelSpec) -> None:
    if not model.memory_layers:
        raise RequestError(
            "without_memory is true, and this model is dense (beta 8): it has no memory to do "
            "without. Leave it out."
        )
    if overlays:
        raise RequestError(
            f"without_memory is true, and overlays are {', '.join(overlays)}: they change a memory "
            "that is off. Leave one of the two out."
        )


def _check_timeout(timeout: object) -> None:
    if not is_number(timeout) or timeout <= 0:
        raise wrong_value("timeout", timeout, "seconds above 0")
