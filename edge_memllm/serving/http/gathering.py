"""The choices of a reply while they come: pieces in, whole choices and parts of them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edge_memllm.serving.channel import Reply
from edge_memllm.serving.http.call import Call
from edge_memllm.serving.http.reply_format import Content, Json, usage_of
from edge_memllm.serving.http.service import Service
from edge_memllm.serving.http.token_scores import PlacedScore
from edge_memllm.serving.pieces import ReplyPiece
from edge_memllm.tokenization import Detokenizer

_MANY = 512  # tokens that are quickly written out


class Addition(NamedTuple):
    """What a piece adds to a choice."""

    choice: int  # its number, among those of all prompts
    part: Content
    first: bool


class Gathering:
    """All choices of one call, in the order of its prompts. Not thread-safe."""

    def __init__(self, call: Call, service: Service, replies: Sequence[Reply]) -> None:
        self.wholes = [Content() for _ in range(len(call.prompts) * call.wishes.choices)]
        self._begun: set[int] = set()
        self._call = call
        self._service = service
        self._replies = replies

    def usage_so_far(self) -> Json:
        """Return the tokens of what has come."""
        prompt = sum(len(each.prompt) for each in self._replies)
        completion = sum(len(each.tokens) for each in self.wholes)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def takes_long(self, prompt: int, piece: ReplyPiece) -> bool:
        """Whether adding a piece will: where each token of a prompt begins has to be found out."""
        scores = self._replies[prompt].prompt_scores or ()
        return self._call.echo is not None and len(scores) > _MANY and not self._has(prompt, piece)

    def add(self, prompt: int, piece: ReplyPiece) -> Addition:
        """Take a piece of a prompt's reply."""
        index = self._index(prompt, piece)
        first = not self._has(prompt, piece)
        self._begun.add(index)
        whole, part = self.wholes[index], self._echo(prompt) if first else Content()
        if piece.score is not None:
            part.scores.append(PlacedScore(piece.score, len(whole.text) + len(part.text)))
        part.text += piece.text
        part.reason, part.statistics = piece.finish_reason, piece.statistics
        part.tokens = [] if piece.token is None else [piece.token]
        part.records = list(piece.records)
        whole.tokens += part.tokens
        whole.records += part.records
        whole.text += part.text
        whole.scores += part.scores
        whole.reason, whole.statistics = part.reason, part.statistics
        return Addition(index, part, first)

    def usage(self) -> Json:
        """Return the tokens of the whole, once it is complete."""
        count = self._call.wishes.choices
        known = [each.statistics for each in self.wholes if each.statistics is not None]
        return usage_of(known[at : at + count] for at in range(0, len(known), count))

    def _index(self, prompt: int, piece: ReplyPiece) -> int:
        return prompt * self._call.wishes.choices + piece.choice

    def _has(self, prompt: int, piece: ReplyPiece) -> bool:
        return self._index(prompt, piece) in self._begun

    def _echo(self, prompt: int) -> Content:
        """Return what a choice begins with: its prompt, where that was wished for."""
        if self._call.echo is None:
            return Content()
        part = Content(self._call.echo[prompt])
        detokenizer, shown = Detokenizer(self._service.model.tokenizer), 0
        for score in self._replies[prompt].prompt_scores or ():
            part.scores.append(PlacedScore(score, shown))
            shown += len(detokenizer.push(score.token))
        return part
