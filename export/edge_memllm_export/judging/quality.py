"""What an artifact has lost: divergence and perplexity on a text, and the answers it gives.

A text is read until it is sure on which side of the bounds the artifact lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from edge_memllm.evaluation.perplexity import divergences, exponential
from edge_memllm.progress import Counted
from edge_memllm.sampling import next_token_losses
from edge_memllm_export.judging.answers import (
    MAX_ANSWER_KL,
    MAX_UNLIKELY,
    Answers,
    measure_answers,
)
from edge_memllm_export.judging.judged_artifact import JudgedArtifact
from edge_memllm_export.texts import text_windows

# An export beyond either bound is refused unless the loss is accepted. 8-bit forms stay far
# below both; the paper's 4-bit table costs 0.4 % of perplexity (Table 7), and careful 4-bit
# matrices a few per cent. More than 5 % (0.05 nat) is what going down a model size costs.
MAX_PERPLEXITY_INCREASE = 0.05
MAX_MEAN_KL = 0.05

_WINDOW = 256
_CHUNK_LOGITS = 1 << 21  # alive at once, of the network and of the artifact each
_MOST_CHUNK = 128
_MOST_TOKENS = 4096
_FEWEST_TOKENS = 512
# So many do where the bounds are further away than chance goes. Nearer, it takes more.
_ENOUGH_TOKENS = 1024
_SURE = 4.0  # standard errors, for neighbouring tokens are not independent
# A floor against texts that are next to nothing, not a measured one: the text that comes along
# has thousands of tokens.
LEAST_TOKENS = 128
# Tokens times parameters: about two minutes of one modern core, in both models together.
_TOKEN_PARAMETERS = 1 << 40


@dataclass(frozen=True)
class Quality:
    """How far the artifact is from its checkpoint on `tokens` predicted tokens of a text."""

    tokens: int
    mean_kl: float  # nats, checkpoint to artifact
    max_kl: float
    checkpoint_perplexity: float
    artifact_perplexity: float
    answers: Answers | None = None

    @property
    def perplexity_increase(self) -> float:
        """Relative change of perplexity; 0.01 is one per cent worse."""
        return self.artifact_perplexity / self.checkpoint_perplexity - 1

    @property
    def acceptable(self) -> bool:
        """Whether all bounds hold. A figure that is not a number does not."""
        return self.text_acceptable and (self.answers is None or self.answers.acceptable)

    @property
    def text_acceptable(self) -> bool:
        """The same of the text alone."""
        return self.mean_kl <= MAX_MEAN_KL and self.perplexity_increase <= MAX_PERPLEXITY_INCREASE

    @property
    def losses(self) -> str:
        """What was lost, and the bounds, as a sentence about the artifact goes on."""
        found = (
            f"cost {self.perplexity_increase:+.1%} of perplexity and a mean KL divergence of "
            f"{self.mean_kl:.3f} nats over {self.tokens} tokens; the bounds are "
            f"{MAX_PERPLEXITY_INCREASE:+.1%} and {MAX_MEAN_KL} nats."
        )
        if (answers := self.answers) is None or answers.acceptable:
            return found
        return (
            f"{found} Of {answers.tokens} tokens it answered {answers.prompts} prompts with, the "
            f"checkpoint holds another for twice as likely in {answers.unlikely}, and the mean KL "
            f"divergence is {answers.mean_kl:.3f} nats; the bounds are {MAX_UNLIKELY:.0%} and "
            f"{MAX_ANSWER_KL} nats."
        )


def token_budget(parameters: int) -> int:
    """How many tokens a model of this size is compared on."""
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, _TOKEN_PARAMETERS // parameters))


def measure_quality(
    judged: JudgedArtifact, ids: list[int], progress: Counted | None = None
) -> Quality:
    """Compare the artifact with its checkpoint on the tokens `ids`, in windows of their own.

    All of them where a bound is near; at least 1,024 where both hold, and a window where one of
    them is missed by far.
    """
    window = min(_WINDOW, judged.artifact.manifest.model.max_position_embeddings)
    parts: list[np.ndarray] = []
    done = 0
    for each in text_windows(ids, window, judged.tokenizer.beginning):
        parts += _window_figures(judged, each)
        done = min(done + len(each), len(ids))
        sure = _sure(np.concatenate(parts, axis=1), done)
        if progress is not None:
            progress(len(ids) if sure else done, len(ids))
        if sure:
            break
    return _quality(np.concatenate(parts, axis=1))


def with_answers(
    judged: JudgedArtifact, quality: Quality, progress: Counted | None = None
) -> Quality:
    """The same, and what the artifact answers; see `measure_answers`."""
    return replace(quality, answers=measure_answers(judged, progress))


def _quality(figures: np.ndarray) -> Quality:
    divergence, truth_loss, found_loss = figures
    return Quality(
        tokens=len(divergence),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        checkpoint_perplexity=exponential(float(truth_loss.mean())),
        artifact_perplexity=exponential(float(found_loss.mean())),
    )


def _sure(figures: np.ndarray, tokens: int) -> bool:
    """Whether more tokens would hardly change the verdict on figures [3, n]."""
    divergence, truth_loss, found_loss = figures
    off = [
        _beyond(divergence, MAX_MEAN_KL),
        _beyond(found_loss - truth_loss, float(np.log1p(MAX_PERPLEXITY_INCREASE))),
    ]
    return max(off) > _SURE or (tokens >= _ENOUGH_TOKENS and max(off) < -_SURE)


def _beyond(values: np.ndarray, bound: float) -> float:
    """By how many standard errors a mean is beyond its bound; of what is no number, by none."""
    error = max(float(values.std()) / len(values) ** 0.5, float(np.finfo(np.float64).tiny))
    found = (float(values.mean()) - bound) / error
    return found if np.isfinite(found) else 0.0


def _window_figures(judged: JudgedArtifact, ids: list[int]) -> Iterator[np.ndarray]:
    """Yield [3, n]: divergence, loss of the checkpoint and of the artifact, at each position."""
    vocabulary = judged.artifact.manifest.model.vocab_size
    chunk = min(_MOST_CHUNK, max(1, _CHUNK_LOGITS // vocabulary))
    both = zip(judged.reference.logits(ids, chunk), judged.graph_logits(ids, chunk), strict=True)
    for start, (truth, found) in zip(range(1, len(ids), chunk), both, strict=False):
        targets = ids[start : start + chunk]  # the last position has none
        truth, found = truth[: len(targets)], found[: len(targets)]
        losses = (next_token_losses(logits, targets) for logits in (truth, found))
        yield np.stack([divergences(truth, found), *losses])
