"""Where in a text memory matters: what becomes of each next token when a memory is turned off.

Measured by gain, on any runtime: the text is computed once as it is, once with each layer's
memory off and once with all of it off. So it counts what a memory does through later layers, too,
which the direct parts of a logit do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Doubles
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.artifact.manifest import Manifest
from edge_memllm.errors import RequestError
from edge_memllm.evaluation.perplexity import Predictor, token_losses
from edge_memllm.feeding import Feeder
from edge_memllm.interpretation.findings import Sentence
from edge_memllm.interpretation.tokens import TokenTexts
from edge_memllm.progress import Progress
from edge_memllm.runtime_protocol import KVCache, Runtime, StepLogits
from edge_memllm.table.source import RecordSource
from edge_memllm.text.tokenization import Tokenizer

_CHUNK = 64  # positions computed at once


class GainedRuntime:
    """A runtime with gains [L] in place of its model's; see `edge_memllm.runtime_protocol`."""

    def __init__(self, runtime: Runtime, gain: NDArray[np.float32]) -> None:
        """Take a runtime that stays the caller's to close."""
        self.name = runtime.name
        self.device = runtime.device
        self._runtime = runtime
        self._gain = gain

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache of the runtime's own."""
        return self._runtime.new_cache(batch)

    def step(
        self,
        buffer: RecordBuffer,
        distinct: int,
        token_index: NDArray[np.int64],
        cache: KVCache,
        logits_index: NDArray[np.int64] | None,
        *,
        sequence: int | range | None = None,
        memory_gain: NDArray[np.float32] | None = None,
    ) -> StepLogits:
        """Append tokens and return logits; gains that are given count in place of its own."""
        gain = self._gain if memory_gain is None else memory_gain
        return self._runtime.step(
            buffer, distinct, token_index, cache, logits_index, sequence=sequence, memory_gain=gain
        )

    def close(self) -> None:
        """Nothing to free: the runtime belongs to the caller."""


@dataclass(frozen=True)
class ScaledModel:
    """A model with another runtime; see `edge_memllm.evaluation.perplexity.Predictor`."""

    manifest: Manifest
    runtime: Runtime
    table: RecordSource
    tokenizer: Tokenizer
    prefill_chunk: int


def scaled_memory(model: Predictor, factors: Sequence[float]) -> ScaledModel:
    """Return a model whose layers' own gains are multiplied by `factors`, one for each layer.

    It is valid as long as `model` is open. Raises `RequestError` for a dense model, and for
    another number of factors.
    """
    spec = model.manifest.model
    if not spec.memory_layers:
        raise RequestError("This model is dense (beta 8): it has no memory whose gain could count.")
    if len(factors) != spec.num_hidden_layers:
        raise RequestError(
            f"{len(factors)} factors were given, expected one for each of the "
            f"{spec.num_hidden_layers} layers."
        )
    gain = np.asarray(spec.memory_gain, np.float32) * np.asarray(factors, np.float32)
    return ScaledModel(
        manifest=model.manifest,
        runtime=GainedRuntime(model.runtime, gain),
        table=model.table,
        tokenizer=model.tokenizer,
        prefill_chunk=model.prefill_chunk,
    )


def without_layer(model: Predictor, layer: int) -> list[float]:
    """Return the factors that turn one memory off: that of a layer, or the one all layers share."""
    spec = model.manifest.model
    if spec.memory_layers == 1:
        return [0.0] * spec.num_hidden_layers
    return [0.0 if each == layer else 1.0 for each in range(spec.num_hidden_layers)]


def measure_sentence(
    runtime: Runtime,
    table: RecordSource,
    ids: Sequence[int],
    texts: TokenTexts,
    *,
    text: str,
    gain: NDArray[np.float32],
    progress: Progress = lambda *_: None,
) -> Sentence:
    """Measure a text, given as the ids it is fed as, on a model whose gains are `gain` [L].

    The last position's target is the token that the whole model holds for the likeliest. Raises
    `RequestError` for a text that the context does not hold.
    """
    layers = len(gain)
    with Feeder(runtime, table, 1, _CHUNK) as feeder:
        likeliest = int(feeder.prefill(0, ids).argmax())
    fed = [*ids, likeliest]
    found: list[Doubles] = []
    for number, mask in enumerate(_masks(layers)):
        gained = GainedRuntime(runtime, gain * mask)
        losses = token_losses(gained, table, fed, context=len(ids), stride=len(ids))
        found.append(-np.concatenate(list(losses)))
        progress("layers", number + 1, layers + 2)
    return Sentence(
        text=text,
        tokens=tuple(map(texts.token, ids)),
        targets=tuple(map(texts.token, fed[1:])),
        log_probability=found[0],
        without_layer=np.stack(found[1:-1], axis=1),
        without_memory=found[-1],
    )


def _masks(layers: int) -> list[NDArray[np.float32]]:
    """What gains are multiplied by: all on, each layer off, all off."""
    on = np.ones(layers, np.float32)
    return [on, *(on - np.eye(layers, dtype=np.float32)), 0 * on]
