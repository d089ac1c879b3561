from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from edge_memllm.errors import RequestError
from edge_memllm.huggingface import EdgeMemLLMForCausalLM
from support.checkpoints import BOS, CONTEXT, EOS, VOCABULARY
from support.hub import GREEDY, TEXT, ids, padded


@pytest.fixture
def tokenizer(path: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )


def test_the_pipeline_says_what_generate_and_the_checkpoint_say(
    model: EdgeMemLLMForCausalLM,
    network: Any,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    theirs = pipeline("text-generation", model=network, tokenizer=tokenizer)
    for prompt in (TEXT, "x", "It was late, and nobody"):
        said = pipe(prompt, **GREEDY)[0]["generated_text"]
        assert said == theirs(prompt, **GREEDY)[0]["generated_text"]
        assert said == prompt + model.model.generate(prompt, max_new_tokens=12)
    assert "not supported" not in caplog.text


def test_a_batch_in_the_pipeline(
    model: EdgeMemLLMForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["short", TEXT, "a"]
    together = pipe(prompts, batch_size=3, **GREEDY)
    assert together == [pipe(prompt, **GREEDY) for prompt in prompts]


def test_a_padded_batch_generates_what_the_checkpoint_does(
    model: EdgeMemLLMForCausalLM, network: Any
) -> None:
    inputs = padded(TEXT, "short", "medium one")
    assert torch.equal(model.generate(**inputs, **GREEDY), network.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"num_beams": 4, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": False, "repetition_penalty": 1.5},
        {"do_sample": False, "min_new_tokens": 5, "bad_words_ids": [[101]]},
    ],
)
def test_every_way_to_choose_is_the_checkpoints(
    model: EdgeMemLLMForCausalLM, network: Any, how: dict[str, Any]
) -> None:
    inputs = padded(TEXT, "short")
    found = []
    for each in (model, network):
        torch.manual_seed(7)
        found.append(each.generate(**inputs, max_new_tokens=10, **how))
    assert torch.equal(*found)


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamers_get_tokens_as_they_come(model: EdgeMemLLMForCausalLM) -> None:
    streamer = Collected()
    (whole,) = model.generate(ids("x"), streamer=streamer, **GREEDY).tolist()
    assert [token for part in streamer.parts for token in part] == whole
    assert len(streamer.parts) == len(whole)
    assert streamer.ended


def test_stopping_criteria_and_stop_strings(
    model: EdgeMemLLMForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def at_five(tokens: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(tokens),), tokens.shape[1] >= 5)

    criteria = StoppingCriteriaList([at_five])
    stopped = model.generate(ids("x"), stopping_criteria=criteria, **GREEDY)
    assert stopped.shape == (1, 5)
    logits = model(ids("x")).logits[0, -1]
    letter = 65 + int(logits[65:91].argmax())  # the likeliest of those that are text
    only = [[token] for token in range(VOCABULARY) if token != letter]
    found = model.generate(
        ids("x"),
        bad_words_ids=only,
        eos_token_id=-1,
        stop_strings=3 * tokenizer.decode([letter]),
        tokenizer=tokenizer,
        **GREEDY,
    )
    assert found[0, 1:].tolist() == 3 * [letter]


def test_a_text_ends_where_the_manifest_says(model: EdgeMemLLMForCausalLM) -> None:
    assert model.generation_config.eos_token_id == EOS
    assert model.generation_config.bos_token_id == BOS
    (whole,) = model.generate(ids("x"), **GREEDY).tolist()
    found = model.generate(ids("x"), eos_token_id=whole[3], **GREEDY)
    assert found[0].tolist() == whole[: whole.index(whole[3], 1) + 1]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"max_new_tokens": CONTEXT}, RequestError, "need 513 positions and .* holds 512"),
        ({"output_attentions": True}, RequestError, "output_attentions: not there"),
        ({"output_hidden_states": True}, RequestError, "output_hidden_states: not there"),
        ({"cache_implementation": "static"}, RequestError, "cache_implementation: not there"),
        ({"prefill_chunk_size": 4}, RequestError, "prefill_chunk_size: .*prefill_chunk of from"),
        ({"prompt_lookup_num_tokens": 3}, ValueError, "only supports"),
        ({"labels": torch.zeros(1)}, ValueError, "not used by the model: .*labels"),
    ],
)
def test_ways_to_generate_that_are_not_there_are_refused(
    model: EdgeMemLLMForCausalLM, how: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.generate(ids("xy"), **{"max_new_tokens": 3, "do_sample": False} | how)


def test_the_whole_context_can_be_used(path: Path) -> None:
    with EdgeMemLLMForCausalLM.from_pretrained(path, threads=1) as opened:
        prompt = torch.full((1, CONTEXT - 2), 65)
        found = opened.generate(prompt, max_new_tokens=3, eos_token_id=-1, do_sample=False)
        assert found.shape == (1, CONTEXT + 1)
        with pytest.raises(RequestError, match=r"need 513 positions .* holds 512\. Shorten"):
            opened.generate(prompt, max_new_tokens=4)
