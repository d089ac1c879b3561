"""What a user would see: an artifact answers short prompts, and the network looks at each token.

The artifact writes as it will: through the chat template where there is one, the likeliest token,
one at a time. The network then reads what was written. Where it holds another token for likelier,
the artifact took another way; how much likelier tells rounding from damage. Networks are often
undecided, so that a few hundredths of a nat, which no text would show, turn an answer into another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_memllm.engine.feeding import PREFILL_CHUNKS, Feeder
from edge_memllm.errors import RequestError
from edge_memllm.evaluation.perplexity import divergences
from edge_memllm.progress import Counted
from edge_memllm_export.judging.judged_artifact import JudgedArtifact, known_tokens
from edge_memllm_export.texts import judging_prompts

_MOST_WRITTEN = 12  # tokens of an answer
_LIKELIER = 2.0  # times: from here on another token is no longer as good

# Chat prompts are hurt up to twice as much as prose (docs/results/few-bits.md).
MAX_ANSWER_KL = 0.1
# SmolLM2: none of 136 tokens in 8 bits, more than a tenth in 4 bits rounded to nearest (KL 0.3).
MAX_UNLIKELY = 0.1


@dataclass(frozen=True)
class Turn:
    """Where an answer took another way than the network's."""

    prompt: str
    written: str  # of the answer, before
    expected: str  # the network's token, and the artifact's, with what the network gives them
    expected_probability: float
    chosen: str
    chosen_probability: float


@dataclass(frozen=True)
class Answers:
    """How the network sees the tokens that the artifact wrote."""

    prompts: int
    tokens: int
    mean_kl: float  # nats, network to artifact
    max_kl: float
    others: int  # tokens that the network would not have taken
    unlikely: int  # of these, such that it holds another for twice as likely at least
    turns: tuple[Turn, ...]  # the first one of each answer that has one

    @property
    def acceptable(self) -> bool:
        """Whether both bounds hold. A figure that is not a number does not."""
        return self.mean_kl <= MAX_ANSWER_KL and self.unlikely <= MAX_UNLIKELY * self.tokens


@dataclass(frozen=True)
class _Answer:
    """One answer of N tokens: all arrays [N]."""

    prompt: str
    written: list[int]
    expected: np.ndarray  # the network's likeliest tokens
    divergence: np.ndarray
    probabilities: np.ndarray  # [2, N]: what the network gives its own tokens and those written

    @property
    def ratio(self) -> np.ndarray:
        """How many times likelier the network's own token is."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found: np.ndarray = self.probabilities[0] / self.probabilities[1]
        return found


def measure_answers(judged: JudgedArtifact, progress: Counted | None = None) -> Answers:
    """Let the artifact answer the prompts that come along, and the network read the answers.

    Raises ExportError for a tokenizer of another model.
    """
    prompts = judging_prompts()
    answers = []
    for number, prompt in enumerate(prompts, 1):
        answers.append(_answer(judged, prompt))
        if progress is not None:
            progress(number, len(prompts))
    divergence = np.concatenate([each.divergence for each in answers])
    ratio = np.concatenate([each.ratio for each in answers])
    return Answers(
        prompts=len(prompts),
        tokens=len(divergence),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        others=int((ratio > 1).sum()),
        unlikely=int((ratio >= _LIKELIER).sum()),
        turns=tuple(turn for each in answers if (turn := _turn(judged, each)) is not None),
    )


def _answer(judged: JudgedArtifact, prompt: str) -> _Answer:
    context = judged.artifact.manifest.model.max_position_embeddings
    ids = known_tokens(judged, _prompt_tokens(judged, prompt))[: max(1, context - _MOST_WRITTEN)]
    found, written = _write(judged, ids, min(_MOST_WRITTEN, context - len(ids)))
    read = [*ids, *written[:-1]]
    truth = np.concatenate(list(judged.reference.logits(read, len(read))))[-len(written) :]
    expected = truth.argmax(axis=1)
    shifted = truth.astype(np.float64) - truth.max(axis=1, keepdims=True)
    shares = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    places = np.arange(len(written))
    probabilities = np.stack([shares[places, expected], shares[places, written]])
    return _Answer(prompt, written, expected, divergences(truth, found), probabilities)


def _prompt_tokens(judged: JudgedArtifact, prompt: str) -> list[int]:
    """The prompt as a message, or as it is where there is no chat."""
    tokenizer = judged.tokenizer
    if tokenizer.chat_template is not None:
        try:
            text = tokenizer.chat_template.render([{"role": "user", "content": prompt}])
        except RequestError:  # it is judged as a model without one
            return tokenizer.encode(prompt)
        return tokenizer.encode(text, special=False)
    return tokenizer.encode(prompt)


def _write(judged: JudgedArtifact, ids: list[int], most: int) -> tuple[np.ndarray, list[int]]:
    """The likeliest tokens after a prompt, N of them, and the logits [N, V] they come from."""
    ends = judged.artifact.manifest.model.eos_token_ids
    found: list[np.ndarray] = []
    written: list[int] = []
    with Feeder(judged.runtime, judged.table, 1, PREFILL_CHUNKS["cpu"]) as feeder:
        logits = np.array(feeder.prefill(0, ids), np.float32)
        while True:
            found.append(logits)
            written.append(int(logits.argmax()))
            if len(written) >= most or written[-1] in ends:
                return np.stack(found), written
            logits = np.array(feeder.decode(written[-1:])[0], np.float32)


def _turn(judged: JudgedArtifact, answer: _Answer) -> Turn | None:
    places = np.flatnonzero(answer.ratio > 1)
    if not len(places):
        return None
    place = int(places[0])
    decode = judged.tokenizer.decode
    expected, chosen = answer.probabilities[:, place].tolist()
    return Turn(
        prompt=answer.prompt,
        written=decode(answer.written[:place]),
        expected=decode([int(answer.expected[place])]),
        expected_probability=expected,
        chosen=decode(answer.written[place : place + 1]),
        chosen_probability=chosen,
    )
