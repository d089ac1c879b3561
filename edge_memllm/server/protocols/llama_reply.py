"""Replies of `/completion`: one object for each prompt, or for each token of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edge_memllm.server.calls import Call
from edge_memllm.server.fields import ApiError
from edge_memllm.server.protocols.llama_form import probabilities, whole_result
from edge_memllm.server.protocols.llama_request import LlamaCall
from edge_memllm.server.protocols.timings import progress_of
from edge_memllm.server.reply_format import Addition, Content, Json, event
from edge_memllm.server.service import Service


class LlamaWriter:
    """Writes one reply, whole or as events."""

    def __init__(self, service: Service, call: Call) -> None:
        assert isinstance(call, LlamaCall)
        self._service = service
        self._call = call
        self._wholes: dict[int, Content] = {}  # of a stream

    def whole(self, contents: Sequence[Content], usage: Json) -> Any:
        """Return the complete reply: a list for a list of prompts."""
        tokens = self._call.return_tokens
        found = [
            self._chosen(
                {
                    **self._result(index, each),
                    "tokens": list(each.tokens) if tokens else [],
                    **self._likelihoods(each),
                }
            )
            for index, each in enumerate(contents)
        ]
        return found if self._call.several else found[0]

    def events(self, addition: Addition, usage: Json | None) -> Iterator[bytes]:
        """Yield what a piece brings: progress, a token, the end."""
        index, part, _ = addition
        if part.progress is not None:
            told = {"prompt_progress": progress_of(part.progress)}
            yield event({**self._part(index, part), **told})
        whole = self._wholes.setdefault(index, Content())
        whole.text += part.text
        whole.tokens += part.tokens
        ended_by_token = part.reason == "stop" and not part.text
        if part.tokens and not ended_by_token:
            yield event({**self._part(index, part), **self._likelihoods(part)})
        if part.reason is not None:
            whole.reason, whole.statistics = part.reason, part.statistics
            whole.stopped_by = part.stopped_by
            result = {**self._result(index, whole), "content": "", "tokens": []}
            yield event(self._chosen(result))

    def ending(self, usage: Json) -> Iterator[bytes]:
        """Nothing follows: the last event of a choice says that it is."""
        yield from ()

    def failure(self, error: ApiError) -> bytes:
        """Return the event that says what went wrong."""
        return event(error.body())

    def _part(self, index: int, part: Content) -> Json:
        whole = self._wholes.get(index, Content())
        timings = {} if part.timings is None else {"timings": part.timings}
        return {
            "index": index,
            "content": part.text,
            "tokens": list(part.tokens),
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": len(whole.tokens),
            "tokens_evaluated": len(self._call.prompts[index]),
            **timings,
        }

    def _result(self, index: int, content: Content) -> Json:
        prompt = self._call.prompts[index]
        return {"index": index, **whole_result(content, prompt, self._call, self._service)}

    def _likelihoods(self, content: Content) -> Json:
        request = self._call.request
        if request.top is None:
            return {}
        scores = [each.score for each in content.scores]
        told = probabilities(scores, request, self._service.texts)
        return {"completion_probabilities": told}

    def _chosen(self, result: Json) -> Json:
        """Return what of a result was asked for; `a/b` is the field b of a, under that name."""
        if not self._call.response_fields:
            return result
        found = ((path, _at(result, path)) for path in self._call.response_fields)
        return {path: value for path, value in found if value is not _MISSING}


_MISSING = object()


def _at(value: Any, path: str) -> Any:
    for name in path.split("/"):
        if not isinstance(value, dict) or name not in value:
            return _MISSING
        value = value[name]
    return value
