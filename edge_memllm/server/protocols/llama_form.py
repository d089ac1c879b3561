"""What llama.cpp's `/completion` tells of a reply; a chat with `verbose` tells it as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_memllm.engine.request import Request
from edge_memllm.engine.scores import TokenScore
from edge_memllm.sampling import FORBIDDEN, Penalties, Sampling
from edge_memllm.server.calls import Call
from edge_memllm.server.protocols.timings import timings_of
from edge_memllm.server.reply_format import Content
from edge_memllm.server.service import Service
from edge_memllm.text.token_texts import TokenTexts
from edge_memllm.text.tokenization import Detokenizer

Json = dict[str, Any]

# Ways of choosing that this server has not, with the values that switch them off.
_OFF: Json = {
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "typical_p": 1.0,
    "dry_multiplier": 0.0,
    "mirostat": 0,
    "adaptive_target": -1.0,
    "adaptive_decay": 0.0,
    "n_keep": 0,
    "n_discard": 0,
    "min_keep": 0,
}
# In the order in which they act.
_SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")


def whole_result(content: Content, prompt: Sequence[int], call: Call, service: Service) -> Json:
    """Return what is told of a choice that is complete, without its likelihoods."""
    statistics, tokens = content.statistics, len(content.tokens)
    assert statistics is not None
    return {
        "content": content.text,
        "id_slot": -1,  # texts are moved while they are under way
        "stop": True,
        "model": service.settings.model_id,
        "tokens_predicted": tokens,
        "tokens_evaluated": len(prompt),
        "generation_settings": {
            "seed": statistics.seed,
            **generation_settings(call.request, service),
            "stream": call.stream,
        },
        "prompt": prompt_text(service, prompt),
        "has_new_line": "\n" in content.text,
        "truncated": content.reason == "length" and tokens < call.request.max_new_tokens,
        "stop_type": _stop_type(content),
        "stopping_word": content.stopped_by or "",
        "tokens_cached": len(prompt) + max(0, tokens - 1),
        "timings": timings_of(statistics),
    }


def generation_settings(request: Request, service: Service) -> Json:
    """Return how tokens are chosen and what ends a text, under llama.cpp's names."""
    sampling, penalties = request.sampling or Sampling(), request.penalties or Penalties()
    biases = dict(penalties.logit_bias)
    if request.ignore_eos:
        biases |= dict.fromkeys(service.spec.eos_token_ids, FORBIDDEN)
    return {
        **_OFF,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_last_n": -1,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": penalties.presence_penalty,
        "frequency_penalty": penalties.frequency_penalty,
        "stop": list(request.stop),
        "max_tokens": request.max_new_tokens,
        "n_predict": request.max_new_tokens,
        "ignore_eos": request.ignore_eos,
        "logit_bias": [
            {"token": token, "bias": None if bias == FORBIDDEN else bias}
            for token, bias in biases.items()
        ],
        "n_probs": request.top or 0,
        "post_sampling_probs": request.top_of == "sampling",
        "speculative.n_max": request.speculate,
        "samplers": list(_SAMPLERS),
    }


def prompt_text(service: Service, prompt: Sequence[int]) -> str:
    """Return the text of a prompt, with its special tokens."""
    tokenizer = service.model.tokenizer
    detokenizer = Detokenizer(tokenizer, [each for each in {*prompt} if tokenizer.is_silent(each)])
    return "".join([*map(detokenizer.push, prompt), detokenizer.flush()])


def probabilities(scores: Sequence[TokenScore], request: Request, texts: TokenTexts) -> list[Json]:
    """Return how likely each token was; those it was drawn from, where that was asked for."""
    drawn = request.top_of == "sampling"
    name, likeliest = ("prob", "top_probs") if drawn else ("logprob", "top_logprobs")

    def entry(token: int, logprob: float | None) -> Json:
        told = _probability(logprob) if drawn else logprob
        spelt = {"token": texts.text(token), "bytes": list(texts.utf8(token))}
        return {"id": token, **spelt, name: told}

    return [
        {**entry(each.token, each.logprob), likeliest: [entry(*other) for other in each.top]}
        for each in scores
    ]


def _probability(logprob: float | None) -> float | None:
    return None if logprob is None else float(np.exp(logprob))


def _stop_type(content: Content) -> str:
    if content.reason == "length":
        return "limit"
    return "eos" if content.stopped_by is None else "word"
