"""The outermost ring: a loaded model that turns a prompt into text.

Owns everything that was opened. Usable from several threads at once: each generation has its own
keys and values, and after `close` the last one under way frees the model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from threading import Lock
from types import TracebackType
from typing import Any, Self, overload

from edge_memllm.artifact import Artifact
from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.footprint import PREFILL_CHUNKS
from edge_memllm.generation import TokenSequence
from edge_memllm.memory_plan import MemoryPlan
from edge_memllm.request import (
    Prompt,
    check_speculate,
    check_tokens,
    prompt_tokens,
    token_limit,
)
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.sampling import Sampler, Sampling, check_seed, draw_seed
from edge_memllm.stopping import check_stops
from edge_memllm.streaming import Piece, stream_pieces
from edge_memllm.table import Table
from edge_memllm.tokenization import Tokenizer, read_json

__all__ = ["Model", "Piece"]


class Model:
    """A model ready to generate; `edge_memllm.load` makes one. Close it, or use `with`."""

    def __init__(
        self,
        artifact: Artifact,
        table: Table,
        runtime: Runtime,
        tokenizer: Tokenizer,
        *,
        prefill_chunk: int | None = None,
        memory: MemoryPlan | None = None,
    ) -> None:
        """Take over what is open: `close` closes it.

        `prefill_chunk` is in tokens, None chooses by device; `memory` is what was planned, for
        `describe`. Raises `ArtifactError` for a wrong `generation_config.json`.
        """
        self.manifest = artifact.manifest
        self.runtime = runtime
        self.table = table
        self.tokenizer = tokenizer
        self.sampling = _artifact_sampling(artifact)
        self.prefill_chunk = prefill_chunk or PREFILL_CHUNKS[runtime.device]
        self._memory = memory
        self._artifact = artifact
        self._lock = Lock()
        self._running = 0
        self._closed = False

    @property
    def device(self) -> str:
        """Where the graph runs: "cpu" or "cuda"."""
        return self.runtime.device

    @property
    def reader(self) -> str:
        """How the table is read: the name of a reader, never "auto"."""
        return self.table.reader_name

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        speculate: int = 0,
    ) -> Generator[Piece, None, None]:
        """Check the request now, then yield one piece of text per new token.

        `prompt` is text or token ids. `sampling` None takes the artifact's own; the same `seed`
        gives the same text, None draws one and the statistics tell it. `ignore_eos` goes on
        after the end of the text, as measurements want. `speculate` is the most draft tokens of
        one step, copied from earlier in the text and kept as far as the model would have chosen
        them; 0 is off. Closing the iterator, or leaving it, frees all it holds; the model stays
        usable.

        Raises `RequestError` for what cannot be done, before any work.
        """
        stops, seed, drafts = check_stops(stop), _seed(seed), check_speculate(speculate)
        sequence = self._sequence(prompt, max_new_tokens, sampling, seed, 0, ignore_eos)
        return self._one(self._pieces([sequence], stops, seed, drafts))

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = ...,
        stop: str | Sequence[str] = ...,
        sampling: Sampling | None = ...,
        seed: int | None = ...,
        ignore_eos: bool = ...,
        speculate: int = ...,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        max_new_tokens: int = ...,
        stop: str | Sequence[str] = ...,
        sampling: Sampling | None = ...,
        seed: int | None = ...,
        ignore_eos: bool = ...,
        speculate: int = ...,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        speculate: int = 0,
    ) -> str | list[str]:
        """Return the text that follows a prompt; for a list of prompts, the list of texts.

        Several prompts advance together; each text is the one its prompt would have alone, up to
        the rounding of the graph's arithmetic. When sampling, each further prompt draws numbers
        of its own, so equal prompts get different texts. The rest is as in `stream`; only
        `speculate` is for one prompt, not for a list.
        """
        batch = _is_batch(prompt)
        prompts: Sequence[Any] = prompt if batch else [prompt]
        stops, seed, drafts = check_stops(stop), _seed(seed), check_speculate(speculate)
        if batch and drafts:
            raise RequestError(
                f"speculate is {drafts} and a list of prompts was given: drafts are for one prompt "
                "at a time. Give one prompt, or speculate 0."
            )
        sequences = [
            self._sequence(one, max_new_tokens, sampling, seed, number, ignore_eos)
            for number, one in enumerate(prompts)
        ]
        texts = [""] * len(sequences)
        for number, piece in self._pieces(sequences, stops, seed, drafts):
            texts[number] += piece.text
        return texts if batch else texts[0]

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        return self.tokenizer.encode(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self.tokenizer.decode(check_tokens(ids, self.manifest.model.vocab_size))

    def describe(self) -> dict[str, Any]:
        """Return what is loaded and what was chosen, as a dict for JSON."""
        model, graph = self.manifest.model, self.manifest.graph
        return {
            "identity": model.identity,
            "beta": model.beta,
            "layers": model.num_hidden_layers,
            "width": model.hidden_size,
            "vocabulary": model.vocab_size,
            "context": model.max_position_embeddings,
            "codec": self.manifest.table.codec,
            "record_bytes": self.table.layout.record_bytes,
            "graph_weights": graph.weights,
            "compute_dtype": graph.compute_dtype,
            "runtime": self.runtime.name,
            "device": self.device,
            "reader": self.reader,
            "reader_reason": self.table.reader_reason,
            "prefill_chunk": self.prefill_chunk,
            "memory": None if self._memory is None else self._memory.as_dict(),
        }

    def close(self) -> None:
        """Take no further generation; free everything once those under way have ended."""
        with self._lock:
            last = not self._closed and self._running == 0
            self._closed = True
        if last:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _sequence(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: Sampling | None,
        seed: int,
        stream: int,
        ignore_eos: bool,
    ) -> TokenSequence:
        model = self.manifest.model
        tokens = prompt_tokens(prompt, self.tokenizer, model)
        limit = token_limit(max_new_tokens, len(tokens), model.max_position_embeddings)
        sampler = Sampler(self.sampling if sampling is None else sampling, seed, stream)
        ends = frozenset[int]() if ignore_eos else frozenset(model.eos_token_ids)
        return TokenSequence(tokens, sampler, limit, ends)

    def _pieces(
        self, sequences: Sequence[TokenSequence], stops: Sequence[str], seed: int, drafts: int
    ) -> Generator[tuple[int, Piece], None, None]:
        stream = stream_pieces(
            self.runtime,
            self.table,
            self.tokenizer,
            sequences,
            stops=stops,
            seed=seed,
            prefill_chunk=self.prefill_chunk,
            speculate=drafts,
        )
        with self._in_use(), closing(stream):
            yield from stream

    @staticmethod
    def _one(pieces: Generator[tuple[int, Piece], None, None]) -> Generator[Piece, None, None]:
        with closing(pieces):
            for _, piece in pieces:
                yield piece

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise RequestError("The model is closed. Load it again.")
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                last = self._closed and self._running == 0
            if last:
                self._release()

    def _release(self) -> None:
        self.runtime.close()
        self.table.close()
        self._artifact.close()


def _is_batch(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def _seed(seed: int | None) -> int:
    return draw_seed() if seed is None else check_seed(seed)


def _artifact_sampling(artifact: Artifact) -> Sampling:
    try:
        return Sampling.from_generation_config(read_json(artifact, "generation_config.json"))
    except RequestError as error:
        where = artifact.path / "generation_config.json"
        raise ArtifactError(f"{where}: {error} Correct it and export again.") from error
