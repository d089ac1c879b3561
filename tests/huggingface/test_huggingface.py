from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
)

from edge_memllm.errors import RequestError
from edge_memllm.huggingface import EdgeMemLLMConfig, EdgeMemLLMForCausalLM
from edge_memllm.huggingface.generating import GenerationCache
from edge_memllm.modeling.configuration import CACHE
from support.checkpoints import VOCABULARY
from support.hub import GREEDY, TEXT, ids, padded


def reference(network: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the network; positions count from the first token that is not padding."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits: torch.Tensor = network(**inputs, position_ids=positions).logits
    return logits


@pytest.mark.parametrize("keep", [0, 1, 3, 100])
def test_logits_are_the_checkpoints(model: EdgeMemLLMForCausalLM, network: Any, keep: int) -> None:
    inputs = padded(TEXT, "short", "medium one")
    found = model(**inputs, logits_to_keep=keep).logits
    expected = reference(network, inputs)[:, -keep if keep < 100 else 0 :]
    shown = inputs["attention_mask"][:, -found.shape[1] :] == 1
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert (found - expected)[shown].abs().max() <= 1e-4
    assert not found[~shown].any()


def test_steps_with_a_past_are_the_whole_text(model: EdgeMemLLMForCausalLM) -> None:
    inputs = padded(TEXT, "short")
    whole = model(**inputs).logits
    tokens, mask = inputs.values()
    past = None
    for start, stop in ((0, 20), (20, 21), (21, 23)):
        output = model(tokens[:, start:stop], mask[:, :stop], past)
        past = output[CACHE]
        assert past.get_seq_length() == stop
        assert torch.allclose(output.logits[:, -1], whole[:, stop - 1], atol=1e-5)


def test_without_a_cache_nothing_is_kept(model: EdgeMemLLMForCausalLM) -> None:
    output = model(ids(TEXT), use_cache=False)
    assert CACHE not in output
    logits, kept = model(ids(TEXT), return_dict=False)
    assert torch.equal(logits, output.logits)
    assert isinstance(kept, GenerationCache)
    expected = model.generate(ids(TEXT), **GREEDY)
    assert torch.equal(model.generate(ids(TEXT), use_cache=False, **GREEDY), expected)


def test_a_conversation_goes_on_from_its_past(model: EdgeMemLLMForCausalLM) -> None:
    first = model.generate(ids(TEXT), return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, ids(" And then")], 1)
    again = model.generate(longer, **{CACHE: first[CACHE]}, **GREEDY)
    assert torch.equal(again, model.generate(longer, **GREEDY))


def test_a_past_can_be_cropped(model: EdgeMemLLMForCausalLM) -> None:
    inputs = padded(TEXT, "short")
    tokens, mask = inputs.values()
    output = model(**inputs)
    past, whole = output[CACHE], output.logits
    past.crop(-2)
    assert past.get_seq_length() == tokens.shape[1] - 2
    again = model(tokens[:, -2:], mask, past).logits
    assert torch.allclose(again, whole[:, -2:], atol=1e-5)
    past.crop(3)  # into the padding of the second sequence
    again = model(tokens[:1, 3:].repeat(2, 1), torch.ones(2, tokens.shape[1]), past).logits
    assert torch.allclose(again[0], whole[0, 3:], atol=1e-5)
    with pytest.raises(RequestError, match=r"crop to 99: expected at most the 23 columns"):
        past.crop(99)


def test_memory_is_freed_with_the_generation(model: EdgeMemLLMForCausalLM) -> None:
    def caches() -> int:
        gc.collect()
        return sum(type(each) is GenerationCache for each in gc.get_objects())

    before = caches()
    kept = model.generate(ids("x"), return_dict_in_generate=True, **GREEDY)
    model.generate(ids("x"), **GREEDY)
    assert caches() == before + 1
    kept[CACHE].close()
    kept[CACHE].close()
    with pytest.raises(ValueError, match="the cache is closed"):
        model(ids("y"), cache=kept[CACHE])


def test_a_closed_model_is_closed(path: Path) -> None:
    opened = EdgeMemLLMForCausalLM.from_pretrained(path, threads=1)
    past = opened(ids("x"))[CACHE]
    opened.close()
    opened.close()
    with pytest.raises(RequestError, match="The model is closed"):
        opened.generate(ids("x"), **GREEDY)
    opened(ids("y"), cache=past)  # what is under way may end
    del past, opened
    gc.collect()


def masked(*rows: list[int]) -> dict[str, torch.Tensor]:
    return {"attention_mask": torch.tensor(rows)}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[1, VOCABULARY]])}, r"holds 300, expected ids from 0 to 299"),
        ({"input_ids": torch.tensor([[-1]])}, r"input_ids holds -1"),
        ({"input_ids": torch.tensor([1, 2])}, r"shape \(2,\), expected at least one token"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"shape \(1, 0\)"),
        (masked([1, 1]), r"attention_mask has the shape \(1, 2\), expected \(1, 3\)"),
        (masked([1, 1, 0]), r"not on the left .*padding_side = 'left'"),
        (masked([0, 1, 0]), r"not on the left"),
        (masked([0, 0, 0]), r"or all of it.*no empty prompt"),
        ({"cache": DynamicCache()}, r"is a DynamicCache, expected what this model"),
        ({"logits_to_keep": -1}, r"logits_to_keep is -1, expected a number of tokens, 0"),
        ({"logits_to_keep": torch.tensor([0])}, r"logits_to_keep is tensor"),
    ],
)
def test_inputs_that_cannot_be_are_refused(
    model: EdgeMemLLMForCausalLM, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        model(**{"input_ids": ids("abc")} | inputs)


def test_padding_after_the_beginning_and_another_batch_are_refused(
    model: EdgeMemLLMForCausalLM,
) -> None:
    past = model(ids("ab", "cd"))[CACHE]
    with pytest.raises(RequestError, match=r"text that has begun: padding comes first"):
        model(ids("ef", "gh"), torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]), past)
    with pytest.raises(RequestError, match=r"input_ids has 1 rows and \w+ 2"):
        model(ids("ef"), cache=past)


def test_the_past_goes_by_either_of_its_names(model: EdgeMemLLMForCausalLM) -> None:
    whole = model(ids("abcd")).logits
    for name in ("cache", "past_key_values"):
        rest = model(ids("cd"), **{name: model(ids("ab"))[CACHE]}).logits
        assert (rest - whole[:, 2:]).abs().max() <= 1e-5
    past = model(ids("ab"))[CACHE]
    with pytest.raises(RequestError, match="two names of one argument"):
        model(ids("cd"), cache=past, past_key_values=past)


def test_devices(model: EdgeMemLLMForCausalLM) -> None:
    assert model.to("cpu").eval() is model
    assert model.can_generate()
    with pytest.raises(RequestError, match=r"device cuda:1: .*from_pretrained device='cuda'"):
        model.to("cuda:1")


def test_beams_are_refused_where_sequences_cannot_move(
    model: EdgeMemLLMForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = model(ids("ab", "cd"))[CACHE]
    past._feeder.cache.copies = False
    past.reorder_cache(torch.tensor([0, 1]))
    with pytest.raises(RequestError, match=r"beam search moves .*Use num_beams=1"):
        past.reorder_cache(torch.tensor([1, 1]))


def test_the_configuration_is_the_manifests(model: EdgeMemLLMForCausalLM) -> None:
    config, manifest = model.config, model.model.manifest.model
    assert isinstance(config, EdgeMemLLMConfig)
    assert config.to_dict()["hidden_size"] == manifest.hidden_size
    assert (config.vocab_size, config.identity) == (VOCABULARY, manifest.identity)
    assert not config.is_encoder_decoder
