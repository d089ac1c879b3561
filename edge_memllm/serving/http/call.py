"""One request, understood: what is asked of the engine, and how the reply is to be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_memllm.sampling import Sampling
from edge_memllm.serving.grammar import MakeConstraint
from edge_memllm.serving.http.response_format import WantedSchema
from edge_memllm.serving.request import Request
from edge_memllm.steering import Steering


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What completions and chat have in common."""

    sampling: Sampling
    steering: Steering
    schema: WantedSchema | None
    choices: int
    seed: int | None
    stops: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    ignore_eos: bool
    overlays: tuple[str, ...] | None
    without_memory: bool
    trace: bool
    stream: bool
    usage: bool  # at the end of a stream
    running_usage: bool  # with each of its parts
    statistics: bool
    user: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A whole request: its prompts as token ids, each to get `wishes.choices` replies."""

    wishes: Wishes
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    top: int | None  # likeliest tokens to tell for each token, None to tell no likelihoods
    echo: Sequence[str] | None = None  # the texts of the prompts, where replies begin with them

    def requests(
        self,
        client: str,
        timeout: float | None = None,
        since: float | None = None,
        constraint: MakeConstraint | None = None,
    ) -> list[Request]:
        """Return what the engine is asked for, one request for each prompt.

        `constraint` is what was made of `wishes.schema`; the rest is as in `Request`.
        """
        wishes = self.wishes
        whose = f"{client}/{wishes.user}" if wishes.user else client
        return [
            Request(
                prompt=prompt,
                max_new_tokens=self.max_tokens,
                stop=wishes.stops,
                stop_token_ids=wishes.stop_tokens,
                sampling=wishes.sampling,
                steering=wishes.steering,
                constraint=constraint,
                seed=wishes.seed,
                ignore_eos=wishes.ignore_eos,
                choices=wishes.choices,
                top=self.top,
                score_prompt=self.echo is not None and self.top is not None,
                overlays=wishes.overlays,
                without_memory=wishes.without_memory,
                trace=wishes.trace,
                client=whose,
                timeout=timeout,
                since=since,
            )
            for prompt in self.prompts
        ]
