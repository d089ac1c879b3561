"""Where in a text memory matters: what becomes of each next token when a memory is turned off.

Measured by gain, on any runtime: the text is computed once as it is, once with each layer's
memory off and once with all of it off. So it counts what a memory does through later layers, too,
which the direct parts of a logit do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_memllm.feeding import Feeder
from edge_memllm.interpretation.findings import Floats, Sentence
from edge_memllm.interpretation.gained_runtime import GainedRuntime
from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.perplexity import token_losses
from edge_memllm.record_source import RecordSource
from edge_memllm.runtime_protocol import Runtime

Progress = Callable[[str, int, int], None]

_CHUNK = 64  # positions computed at once


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
    found: list[Floats] = []
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
