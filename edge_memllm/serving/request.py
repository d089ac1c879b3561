"""What may be asked of an engine, checked before it takes a place in the queue.

Knows the model's shape and tokenizer; nothing of slots, threads or runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_memllm.checked_values import check_integer, is_number, wrong_value
from edge_memllm.errors import RequestError
from edge_memllm.manifest import ModelSpec
from edge_memllm.request import (
    Prompt,
    check_positive,
    check_tokens,
    ending_tokens,
    prompt_tokens,
    token_limit,
)
from edge_memllm.sampling import Sampling, check_seed, draw_seed
from edge_memllm.steering import Constraint, Steering
from edge_memllm.stopping import check_stops
from edge_memllm.tokenization import Tokenizer

MOST_TOP = 100


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
