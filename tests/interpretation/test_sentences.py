"""What turning memories off does to each next token, on checkpoints and on artifacts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_memllm import RequestError
from edge_memllm.interpretation.explaining import Questions, explain, open_subject
from edge_memllm.interpretation.findings import Sentence
from support.checkpoints import BOS, LAYERS, VOCABULARY, MakeArtifact, MakeCheckpoint
from support.interpretation import WITH_MEMORY
from support.small_model import byte_tokenizer

CASES = {**WITH_MEMORY, "half": {"dtype": "float16"}, "bfloat16": {"dtype": "bfloat16"}}
TEXT = "It runs to the sea."
IDS = [BOS, *byte_tokenizer().encode(TEXT)]


def sentence(path: Path, text: str = TEXT) -> Sentence:
    with open_subject(path, threads=1) as subject:
        return explain(subject, Questions(texts=(text,))).sentences[0]


def log_probabilities(path: Path, targets: list[int], gain: list[float] | None) -> np.ndarray:
    """By the network itself, its configuration changed: nothing of ours between."""
    from edge_memllm.modeling import MemoryLLMForCausalLM

    network = MemoryLLMForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if gain is not None:
        network.config.memory_gain = gain
        if network.model.token_memory.gain is not None:
            network.model.token_memory.gain.data.fill_(1)
    with torch.inference_mode():
        logs = network(torch.tensor([IDS])).logits[0].double().log_softmax(-1).numpy()
    return logs[np.arange(len(targets)), targets]


@pytest.mark.parametrize("case", CASES)
def test_effects_are_what_the_network_computes_with_other_gains(
    case: str, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = make_checkpoint(**CASES[case])
    found = sentence(checkpoint)
    assert [token.id for token in found.tokens] == IDS
    targets = [token.id for token in found.targets]
    assert targets[:-1] == IDS[1:]
    with open_subject(checkpoint) as subject:
        own = list(subject.facts.memory_gain)
    expected = log_probabilities(checkpoint, targets, None)
    np.testing.assert_allclose(found.log_probability, expected, atol=1e-4)
    for layer in range(LAYERS):
        gain = [value * (number != layer) for number, value in enumerate(own)]
        expected = log_probabilities(checkpoint, targets, gain)
        np.testing.assert_allclose(found.without_layer[:, layer], expected, atol=1e-4)
    expected = log_probabilities(checkpoint, targets, [0.0] * LAYERS)
    np.testing.assert_allclose(found.without_memory, expected, atol=1e-4)
    np.testing.assert_allclose(
        found.memory_effect, found.log_probability - found.without_memory, atol=1e-12
    )
    assert found.layer_effect.shape == (len(IDS), LAYERS)


def test_the_last_target_is_the_likeliest_token(make_checkpoint: MakeCheckpoint) -> None:
    found = sentence(make_checkpoint())
    others = [log_probabilities(make_checkpoint(), [token] * len(IDS), None) for token in (1, 65)]
    assert found.log_probability[-1] > max(each[-1] for each in others)
    assert found.log_probability[-1] > -np.log(VOCABULARY)


@pytest.mark.parametrize("fields", [{}, {"beta": 2, "num_key_value_heads": 2}])
def test_an_artifact_gives_the_same_effects_without_the_weights(
    fields: dict, make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    exact = sentence(make_checkpoint(**fields))
    found = sentence(make_artifact(graph_weights="fp32", table_codec="f32", **fields))
    assert found.direct is None
    assert found.targets == exact.targets
    for name in ("log_probability", "without_layer", "without_memory"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=1e-3)


def test_direct_parts_belong_to_the_same_logits(make_checkpoint: MakeCheckpoint) -> None:
    found = sentence(make_checkpoint(beta=1))
    direct = found.direct
    assert direct is not None
    layered = direct.attention + direct.compute + direct.memory
    np.testing.assert_allclose(direct.embedding + layered.sum(axis=1), direct.logit, atol=2e-4)


def test_a_text_longer_than_the_context_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(RequestError, match="has 601 tokens and the model's context holds 512"):
        sentence(make_checkpoint(), "x" * 600)


def test_a_text_that_fills_the_context_is_taken(make_artifact: MakeArtifact) -> None:
    assert len(sentence(make_artifact(graph_weights="fp32"), "x" * 511).targets) == 512


def test_a_text_of_nothing_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(RequestError, match="none can be predicted"):
        sentence(make_checkpoint(), "")


def test_findings_can_be_changed_and_told_apart(make_checkpoint: MakeCheckpoint) -> None:
    found = sentence(make_checkpoint())
    assert replace(found, text="another").text == "another"
    assert found.as_dict()["direct"]["memory"][0] == pytest.approx(found.direct.memory[0])
