"""An artifact as a model of lm-evaluation-harness, in the same process.

Importing this registers it there as `edge-memllm`; as a program it is the harness's own command
line with that model added. Needs the extra `eval`. Knows requests, not tasks: what a task is and
how it is scored is the harness's business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.evaluation.tasks import Scorer
from edge_memllm.loading import load
from edge_memllm.model import Model
from edge_memllm.sampling import Sampling
from edge_memllm.text import TOKENIZER_FILE

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as _error:
    raise missing_extra(_error.name or "lm_eval", "eval") from _error

NAME = "edge-memllm"
_log = logging.getLogger(__name__)
# The harness's own, where a task does not say; half the context of a model that has less.
_MOST_NEW_TOKENS = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What the harness passes to every model, of no use here: texts are computed one at a time.
_UNUSED = ("batch_size", "max_batch_size")
# What its command line passes when no device was asked for, GPU or not.
_ANY_DEVICE = (None, "cuda:0")


@register_model(NAME)
class EdgeMemLM(LM):  # type: ignore[misc]  # the harness has no types
    """Answers the requests of the harness with an artifact; deterministic unless told to sample."""

    def __init__(self, path: str | Path | Model, device: Any = None, **options: Any) -> None:
        """Take the artifact's path and the options of `edge_memllm.load`, or an open model.

        A model that was open already stays the caller's to close.
        """
        super().__init__()
        for name in _UNUSED:
            options.pop(name, None)
        self._given = isinstance(path, Model)
        if isinstance(path, Model):
            if options:
                raise RequestError(
                    f"{sorted(options)[0]!r} is for loading, and the model is open already. "
                    "Give the artifact's path, or no options."
                )
            self.model = path
        else:
            self.model = load(path, device="auto" if device in _ANY_DEVICE else device, **options)

    def close(self) -> None:
        """Close the model if it was opened here."""
        if not self._given:
            self.model.close()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, whether greedy) of each continuation behind its context."""
        results: list[tuple[float, bool]] = []
        truncated = 0
        with Scorer(self.model) as scorer:
            # The choices of one item come one behind the other: their context is computed once.
            for context, pairs in groupby(_arguments(requests, disable_tqdm), itemgetter(0)):
                continuations = [continuation for _, continuation in pairs]
                for continuation, found in zip(
                    continuations, scorer.score_texts(context, continuations), strict=True
                ):
                    results.append((found.logprob, found.greedy))
                    truncated += found.truncated
                    self._remember("loglikelihood", (context, continuation), results[-1])
        if truncated:
            _log.warning(
                "%s of %s contexts were too long and lost their beginning", truncated, len(results)
            )
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text, in windows of the whole context.

        Windows do not overlap, but for the last: it reaches back as far as fits.
        """
        results: list[float] = []
        most = self.model.manifest.model.max_position_embeddings
        with Scorer(self.model) as scorer:
            for (text,) in _arguments(requests, disable_tqdm):
                tokens = [scorer.encoder.start, *scorer.encoder.text(text)]
                total = math.fsum(
                    scorer.score(context, [continuation])[0].logprob
                    for context, continuation in rolling_windows(tokens, most)
                )
                results.append(total)
                self._remember("loglikelihood_rolling", (text,), total)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes behind each context, up to a stop string."""
        results: list[str] = []
        with Scorer(self.model) as scorer:
            for context, options in _arguments(requests, disable_tqdm):
                results.append(self._generate(scorer.encoder.text(context), options))
                self._remember("generate_until", (context, options), results[-1])
        return results

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt that the artifact's chat template makes of messages."""
        template = self.model.tokenizer.chat_template
        if template is None:
            raise RequestError(
                "The artifact has no chat template. Leave --apply_chat_template out."
            )
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells its caches of requests apart by."""
        return self.model.manifest.files[TOKENIZER_FILE].sha256

    def _generate(self, tokens: list[int], options: Mapping[str, Any]) -> str:
        limit, stops, sampling = generation_options(options)
        most = self.model.manifest.model.max_position_embeddings
        if limit is None:
            limit = min(_MOST_NEW_TOKENS, most // 2)
        if limit >= most:
            raise RequestError(
                f"max_gen_toks is {limit}, and the model's context of {most} has no room for a "
                "prompt beside it. Ask for fewer tokens."
            )
        if len(tokens) > most - limit:
            _log.warning("a prompt of %s tokens was too long and lost its beginning", len(tokens))
        return self.model.generate(
            tokens[limit - most :], max_new_tokens=limit, stop=stops, sampling=sampling, seed=0
        )

    def _remember(self, kind: str, arguments: tuple[Any, ...], result: object) -> None:
        self.cache_hook.add_partial(kind, arguments, result)


def rolling_windows(tokens: Sequence[int], most: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (context, continuation): each of tokens[1:] once, `most` tokens fed at a time.

    The last window begins earlier where that gives its tokens more to be predicted from.
    """
    for begin in range(1, len(tokens), most):
        end = min(begin + most, len(tokens))
        first = max(0, end - most - 1)
        yield list(tokens[first:begin]), list(tokens[begin:end])


def generation_options(options: Mapping[str, Any]) -> tuple[int | None, list[str], Sampling]:
    """Return the most new tokens, if said, the stop strings and the sampling that a task asks for.

    Greedy unless `do_sample` or a temperature says otherwise. Raises `RequestError` for an option
    that is not known here.
    """
    left = dict(options)
    limits = [value for name in _LIMITS if (value := left.pop(name, None)) is not None]
    until = left.pop("until", None) or []
    sampled = left.pop("do_sample", None)
    chosen = {name: left.pop(name) for name in _SAMPLING if name in left}
    if left:
        known = ", ".join(("until", "do_sample", *_LIMITS, *_SAMPLING))
        raise RequestError(f"Unknown generation option {min(left)!r}, expected {known}.")
    if sampled is None:
        sampled = chosen.get("temperature", 0) > 0
    if sampled:
        chosen.setdefault("temperature", 1.0)
    else:
        chosen = {name: chosen[name] for name in chosen if name == "repetition_penalty"}
    stops = [until] if isinstance(until, str) else list(until)
    return int(limits[0]) if limits else None, stops, Sampling(**chosen)


def _arguments(requests: Sequence[Any], disable_tqdm: bool) -> Iterable[tuple[Any, ...]]:
    from tqdm import tqdm

    return (request.args for request in tqdm(requests, desc=NAME, disable=disable_tqdm or None))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
