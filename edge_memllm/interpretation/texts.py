"""Where in a text memory matters: what becomes of each next token when a memory is turned off.

Measured on any runtime: the text is computed once as it is, once with each layer's memory off and
once with all of it off. So it counts what a memory does through later layers, too, which the direct
parts of a logit do not. Off is a gain of zero, or blank rows where rows are gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edge_memllm.arrays import Doubles, Floats
from edge_memllm.artifact.model_spec import MemorySpec, ModelSpec
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import RequestError
from edge_memllm.evaluation.perplexity import token_losses
from edge_memllm.interpretation.findings import Sentence
from edge_memllm.interpretation.gates import BlankRows, are_gates
from edge_memllm.interpretation.tokens import token_of
from edge_memllm.progress import Progress
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.source import RecordSource
from edge_memllm.text.token_texts import TokenTexts

_CHUNK = 64  # positions computed at once


def scaled_gain(model: ModelSpec, factors: Sequence[float]) -> list[float]:
    """Return a model's own gains multiplied by `factors`, one for each layer.

    Raises `RequestError` for a dense model, and for another number of factors.
    """
    if not model.memory.layers:
        raise RequestError(
            "This model has no token memory (dense): there is no gain that could count."
        )
    if len(factors) != model.num_hidden_layers:
        raise RequestError(
            f"{len(factors)} factors were given, expected one for each of the "
            f"{model.num_hidden_layers} layers."
        )
    gain: Floats = np.asarray(model.memory.gain, np.float32) * np.asarray(factors, np.float32)
    scaled: list[float] = gain.tolist()
    return scaled


class Fed(NamedTuple):
    """What a text is computed with: records, and gains [L] in place of the model's."""

    source: RecordSource
    gain: list[float]


def without_layers(memory: MemorySpec, source: RecordSource, layers: Sequence[int]) -> Fed:
    """Turn the memory of some layers off; a gate they share goes with any of them."""
    if are_gates(memory):
        rows = layers if memory.layers > 1 else [0]
        return Fed(BlankRows(source, rows), list(memory.gain))
    off = set(layers)
    return Fed(source, [0.0 if at in off else gain for at, gain in enumerate(memory.gain)])


def measure_sentence(
    runtime: Runtime,
    table: RecordSource,
    ids: Sequence[int],
    texts: TokenTexts,
    *,
    text: str,
    memory: MemorySpec,
    progress: Progress = lambda *_: None,
) -> Sentence:
    """Measure a text, given as the ids it is fed as, on a model whose memory is `memory`.

    The last position's target is the token that the whole model holds for the likeliest. Raises
    `RequestError` for a text that the context does not hold.
    """
    layers = range(len(memory.gain))
    off = [[], *([layer] for layer in layers), list(layers)]
    with Feeder(runtime, table, 1, _CHUNK) as feeder:
        likeliest = int(feeder.prefill(0, ids).argmax())
    fed = [*ids, likeliest]
    found: list[Doubles] = []
    for number, each in enumerate(off, 1):
        source, gain = without_layers(memory, table, each)
        losses = token_losses(
            runtime, source, fed, context=len(ids), stride=len(ids), memory_gain=gain
        )
        found.append(-np.concatenate(list(losses)))
        progress("layers", number, len(off))
    return Sentence(
        text=text,
        tokens=tuple(token_of(texts, each) for each in ids),
        targets=tuple(token_of(texts, each) for each in fed[1:]),
        log_probability=found[0],
        without_layer=np.stack(found[1:-1], axis=1),
        without_memory=found[-1],
    )
