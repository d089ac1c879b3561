"""What quantisation costs: the artifact against its checkpoint on real text.

Both predict every token of the same text; the checkpoint's probabilities are the truth of the
KL divergence. Knows logits, not how they came about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edge_memllm.errors import ExportError
from edge_memllm.perplexity import next_token_losses
from edge_memllm.tokenization import Tokenizer
from edge_memllm_export.judged_artifact import JudgedArtifact

# An export beyond either bound is refused unless the loss is accepted. 8-bit forms stay far
# below both; the paper's 4-bit table costs 0.4 % of perplexity (Table 7), and careful 4-bit
# matrices a few per cent. More than 5 % (0.05 nat) is what going down a model size costs.
MAX_PERPLEXITY_INCREASE = 0.05
MAX_MEAN_KL = 0.05

_WINDOW = 256
_CHUNK = 32  # positions whose logits are alive at once
_MOST_TOKENS = 4096
_FEWEST_TOKENS = 512
# A floor against texts that are next to nothing, not a measured one: the text that comes along
# has thousands of tokens.
LEAST_TOKENS = 128
# Tokens times parameters: about two minutes of one modern core, in both models together.
_TOKEN_PARAMETERS = 1 << 40

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quality:
    """How far the artifact is from its checkpoint on `tokens` predicted tokens of a text."""

    tokens: int
    mean_kl: float  # nats, checkpoint to artifact
    max_kl: float
    checkpoint_perplexity: float
    artifact_perplexity: float

    @property
    def perplexity_increase(self) -> float:
        """Relative change of perplexity; 0.01 is one per cent worse."""
        return self.artifact_perplexity / self.checkpoint_perplexity - 1

    @property
    def acceptable(self) -> bool:
        """Whether both bounds hold. A figure that is not a number does not."""
        return self.mean_kl <= MAX_MEAN_KL and self.perplexity_increase <= MAX_PERPLEXITY_INCREASE


def token_budget(parameters: int) -> int:
    """How many tokens a model of this size is compared on."""
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, _TOKEN_PARAMETERS // parameters))


def text_tokens(judged: JudgedArtifact, text: str, most: int) -> list[int]:
    """The first tokens of a text, at most `most`, by the artifact's own tokenizer.

    Raises ExportError when it gives tokens the model does not have.
    """
    ids = Tokenizer.from_artifact(judged.artifact).encode(text)[:most]
    vocabulary = judged.artifact.manifest.model.vocab_size
    if max(ids, default=0) >= vocabulary:
        raise ExportError(
            f"tokenizer.json gives token {max(ids)}, the model has {vocabulary}. "
            "The tokenizer is another model's; put the right one into the checkpoint."
        )
    return ids


def measure_quality(
    judged: JudgedArtifact, ids: list[int], progress: Progress | None = None
) -> Quality:
    """Compare the artifact with its checkpoint on the tokens `ids`, in windows of their own."""
    window = min(_WINDOW, judged.artifact.manifest.model.max_position_embeddings)
    parts: list[np.ndarray] = []
    for start in range(0, len(ids), window):
        parts += _window_figures(judged, ids[start : start + window])
        if progress is not None:
            progress(min(start + window, len(ids)), len(ids))
    divergence, truth_loss, found_loss = np.concatenate(parts, axis=1)
    return Quality(
        tokens=len(divergence),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        checkpoint_perplexity=_perplexity(truth_loss),
        artifact_perplexity=_perplexity(found_loss),
    )


def _window_figures(judged: JudgedArtifact, ids: list[int]) -> Iterator[np.ndarray]:
    """Yield [3, n]: divergence, loss of the checkpoint and of the artifact, at each position."""
    both = zip(judged.network_logits(ids, _CHUNK), judged.graph_logits(ids, _CHUNK), strict=True)
    for start, (truth, found) in zip(range(1, len(ids), _CHUNK), both, strict=False):
        targets = ids[start : start + _CHUNK]  # the last position has none
        truth, found = truth[: len(targets)], found[: len(targets)]
        losses = (next_token_losses(logits, targets) for logits in (truth, found))
        yield np.stack([_divergences(truth, found), *losses])


def mean_kl(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean KL divergence in nats between two arrays of logits [T, V]."""
    return float(_divergences(truth, found).mean())


def _divergences(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    logs, other = _log_softmax(truth), _log_softmax(found)
    return (np.exp(logs) * (logs - other)).sum(axis=-1)


def _perplexity(losses: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(losses.mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
