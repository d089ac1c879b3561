"""Likelihoods of tokens as OpenAI's protocol tells them, in its two forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.serving.pieces import TokenScore


@dataclass(frozen=True, slots=True)
class PlacedScore:
    """A token's score, and where in the reply's text (in characters) the token begins."""

    score: TokenScore
    offset: int


def completion_scores(scores: Sequence[PlacedScore], texts: TokenTexts) -> dict[str, Any]:
    """Return the form of `/v1/completions`: four lists of one entry for each token.

    Tokens that are no text of their own are named by their bytes, so that no two share a name.
    """
    return {
        "tokens": [texts.text(each.score.token) for each in scores],
        "token_logprobs": [each.score.logprob for each in scores],
        "top_logprobs": [_by_text(each.score, texts) for each in scores],
        "text_offset": [each.offset for each in scores],
    }


def chat_scores(scores: Sequence[PlacedScore], texts: TokenTexts) -> dict[str, Any]:
    """Return the form of `/v1/chat/completions`: one entry for each token, with its bytes."""
    content = []
    for each in scores:
        token, logprob = each.score.token, each.score.logprob
        top = [
            _entry(other, logprob if other == token else value, texts)
            for other, value in each.score.top
        ]
        content.append({**_entry(token, logprob, texts), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _by_text(score: TokenScore, texts: TokenTexts) -> dict[str, float] | None:
    """Return the likeliest tokens, and the token itself; None where nothing predicts it."""
    if score.logprob is None:
        return None
    likeliest = {texts.text(token): value for token, value in score.top}
    return {**likeliest, texts.text(score.token): score.logprob}


def _entry(token: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.utf8(token))}
