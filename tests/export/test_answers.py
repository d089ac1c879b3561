"""What an artifact answers, seen by its network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_memllm.errors import ExportError
from edge_memllm_export import Answers, Quality
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.judging.answers import measure_answers
from edge_memllm_export.judging.judged_artifact import JudgedArtifact
from edge_memllm_export.texts import judging_prompts
from support.checkpoints import MakeArtifact, MakeCheckpoint

GOOD = Answers(12, 100, 0.01, 0.2, 5, 1, ())


def answers_of(artifact: object, checkpoint: object) -> Answers:
    reference = Checkpoint.open(checkpoint).architecture.reference()  # type: ignore[arg-type]
    with JudgedArtifact(artifact, reference) as judged:  # type: ignore[arg-type]
        return measure_answers(judged)


def test_the_exact_form_answers_as_its_network(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    artifact = make_artifact(graph_weights="fp32", table_codec="f32")
    answers = answers_of(artifact, make_checkpoint())
    assert answers.prompts == len(judging_prompts()) == 12
    assert 12 <= answers.tokens <= 12 * 12
    assert answers.max_kl < 1e-8
    assert (answers.others, answers.turns, answers.acceptable) == (0, (), True)


def test_another_network_would_have_written_something_else(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    answers = answers_of(make_artifact(graph_weights="fp16"), make_checkpoint(seed=3))
    assert answers.unlikely > answers.tokens / 2
    assert not answers.acceptable
    assert len(answers.turns) > 6
    turn = answers.turns[0]
    assert turn.prompt in judging_prompts()
    assert turn.expected_probability > turn.chosen_probability


def test_a_short_context_holds_the_end_of_no_prompt(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    shape = {"max_position_embeddings": 16}
    artifact = make_artifact(graph_weights="fp32", table_codec="f32", **shape)
    answers = answers_of(artifact, make_checkpoint(**shape))
    assert answers.tokens > 12
    assert answers.others == 0


@pytest.mark.parametrize(
    ("changed", "acceptable"),
    [
        ({}, True),
        ({"mean_kl": 0.11}, False),
        ({"mean_kl": float("nan")}, False),
        ({"unlikely": 10}, True),
        ({"unlikely": 11}, False),
    ],
)
def test_bounds_of_answers(changed: dict[str, float], acceptable: bool) -> None:
    answers = replace(GOOD, **changed)
    assert answers.acceptable is acceptable
    quality = Quality(1000, 0.001, 0.1, 20.0, 20.0, answers)
    assert quality.acceptable is acceptable
    assert ("12 prompts" in quality.losses) is not acceptable


def test_tokens_that_the_model_lacks_are_refused(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Checkpoint.open(make_checkpoint()).architecture.reference()
    with JudgedArtifact(make_artifact(), reference) as judged:
        monkeypatch.setattr(judged.tokenizer, "encode", lambda *_, **__: [300])
        with pytest.raises(
            ExportError, match=r"tokenizer\.json gives token 300, the model has 300"
        ):
            measure_answers(judged)


def test_the_prompts_are_a_dozen_short_ones() -> None:
    assert all(0 < len(prompt) < 60 for prompt in judging_prompts())
    assert np.unique(judging_prompts()).size == 12
