"""The middle ring: sequences in, pieces of text out, with statistics at the end.

Puts the token loop, the detokenizer and the stop strings together; nothing of files or devices.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from edge_memllm.cancellation import Cancellation
from edge_memllm.generation import FinishReason, TokenSequence, generate_tokens
from edge_memllm.record_source import RecordSource
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.statistics import GenerationStatistics, Meter
from edge_memllm.stopping import StopMatcher
from edge_memllm.tokenization import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What one new token added to the text; `text` may be empty while it is held back.

    `finish_reason` is None until the last piece: "stop" after an end-of-text token or a stop
    string (which is not shown), "length" at max_new_tokens or at the end of the context.
    """

    text: str
    token: int
    finish_reason: FinishReason | None = None
    statistics: GenerationStatistics | None = None


class TextAssembly:
    """The text of one sequence, as far as it is certain."""

    def __init__(self, tokenizer: Tokenizer, sequence: TokenSequence, stops: Sequence[str]) -> None:
        self._sequence = sequence
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stops)

    def advance(self) -> Piece:
        """Return the piece for the token the sequence has just got; may stop the sequence."""
        sequence = self._sequence
        token = sequence.tokens[-1]
        text = ""
        if token not in sequence.eos_token_ids:
            text = self._matcher.push(self._detokenizer.push(token))
        if sequence.finish_reason is not None:
            text += self._matcher.push(self._detokenizer.flush())
            text += self._matcher.flush()
        if self._matcher.stopped:
            sequence.stop()
        return Piece(text, token, sequence.finish_reason)


def stream_pieces(
    runtime: Runtime,
    table: RecordSource,
    tokenizer: Tokenizer,
    sequences: Sequence[TokenSequence],
    *,
    stops: Sequence[str],
    seed: int,
    prefill_chunk: int,
    speculate: int = 0,
    overlays: tuple[str, ...] = (),
    cancellation: Cancellation | None = None,
) -> Generator[tuple[int, Piece], None, None]:
    """Yield (number of the sequence, piece) for every new token of a batch.

    The very last piece carries the statistics of the whole batch; `seed`, and which `overlays` are
    over the table, are only reported there. The rest is as in `generate_tokens`.
    """
    meter = Meter(runtime, table, seed, overlays)
    tokens = generate_tokens(
        runtime,
        table,
        sequences,
        prefill_chunk=prefill_chunk,
        speculate=speculate,
        costs=meter.costs,
        cancellation=cancellation,
    )
    return assembled(tokens, sequences, tokenizer, stops, meter)


def assembled(
    tokens: Generator[int, None, None],
    sequences: Sequence[TokenSequence],
    tokenizer: Tokenizer,
    stops: Sequence[str],
    meter: Meter,
) -> Generator[tuple[int, Piece], None, None]:
    """Yield the pieces that tokens make; `tokens` yields whose turn it is, and is closed.

    The very last piece carries the statistics of `meter`.
    """
    assemblies = [TextAssembly(tokenizer, sequence, stops) for sequence in sequences]
    with closing(tokens):
        for number in tokens:
            piece = assemblies[number].advance()
            meter.note_token()
            if all(sequence.finish_reason for sequence in sequences):
                piece = replace(piece, statistics=meter.statistics())
            yield number, piece
