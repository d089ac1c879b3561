"""The network: the paper's counts, its two equal forms, and its manners as a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from edge_memllm.errors import RequestError
from edge_memllm.modeling import (
    PRESETS,
    MemoryLLMConfig,
    MemoryLLMForCausalLM,
    TokenRows,
    parameter_counts,
    preset_config,
)
from edge_memllm.modeling.configuration import CACHE
from edge_memllm.modeling.trainer import LanguageModelTrainer, next_token_loss
from support.checkpoints import MakeCheckpoint

# Active parameters in millions: Table 5 of the paper, its column mended (the Flex rows are printed
# in reverse order) and rounded down as printed.
TABLE_5_ACTIVE = {
    "250m": {8: 265, 3: 154, 2: 132, 1: 110, 0: 88},
    "750m": {8: 737, 3: 430, 2: 368, 1: 307, 0: 245},
    "1b": {8: 1208, 3: 704, 2: 604, 1: 503, 0: 402},
}
TABLE_5_TOTAL = {"250m": 265, "750m": 737, "1b": 1208}
TABLE_5_MEMORY_WIDTH = {
    "250m": {1: 2240, 2: 1920, 3: 1600, 0: 2560},
    "750m": {1: 3738, 2: 3200, 3: 2668, 0: 4272},
    "1b": {1: 4778, 2: 4096, 3: 3418, 0: 5464},
}
TABLE_4_MEMORY_PER_LAYER = {1: 29.360e6, 2: 25.165e6, 3: 20.971e6, 0: 33.554e6}

FAMILY: list[dict[str, Any]] = [
    {"beta": 0},
    {"beta": 1},
    {"beta": 2, "num_key_value_heads": 2},
    {"beta": 3, "tie_word_embeddings": True},
    {"beta": 3},
    {"beta": 8, "num_key_value_heads": 1},
    {"beta": 8, "intermediate_size": 0},
    {"beta": 0, "memory_norm": "shared"},
    {"beta": 0, "memory_source": "table"},
    {"beta": 3, "memory_source": "both", "memory_norm": "shared"},
    {"beta": 0, "memory_sharing": "all_layers", "memory_gain": [1.0, 0.5]},
    {"beta": 2, "memory_sharing": "all_layers", "memory_source": "table"},
    {"beta": 1, "memory_sharing": "all_layers", "memory_source": "both"},
]


def load(make_checkpoint: MakeCheckpoint, **fields: Any) -> MemoryLLMForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(**fields))
    assert isinstance(model, MemoryLLMForCausalLM)
    return model.eval()


@pytest.mark.parametrize("size", TABLE_5_ACTIVE)
def test_active_parameters_are_those_of_the_paper(size: str) -> None:
    found = {
        beta: parameter_counts(preset_config(size, beta))["active"] // 1_000_000
        for beta in TABLE_5_ACTIVE[size]
    }
    assert found == TABLE_5_ACTIVE[size]


@pytest.mark.parametrize("size", TABLE_5_TOTAL)
def test_total_parameters_are_those_of_the_paper(size: str) -> None:
    for beta in (0, 8):
        total = parameter_counts(preset_config(size, beta))["total"]
        assert total // 1_000_000 == TABLE_5_TOTAL[size]
    for beta in (1, 2, 3):  # the printed widths are rounded, up to 0.1 % of the total
        total = parameter_counts(preset_config(size, beta))["total"]
        assert total == pytest.approx(TABLE_5_TOTAL[size] * 1e6, rel=2e-3)


def test_memory_widths_are_those_of_the_paper() -> None:
    for size, widths in TABLE_5_MEMORY_WIDTH.items():
        assert PRESETS[size].memory_widths == widths
    for beta, expected in TABLE_4_MEMORY_PER_LAYER.items():
        counts = parameter_counts(preset_config("1b", beta))
        assert counts["memory"] / 24 == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("fields", FAMILY, ids=str)
def test_counts_equal_the_real_network(make_checkpoint: MakeCheckpoint, fields: Any) -> None:
    model = load(make_checkpoint, **fields)
    parts = (model.model.layers, model.model.token_memory)
    matrices = sum(p.numel() for part in parts for p in part.parameters() if p.dim() == 2)
    assert parameter_counts(model.config)["total"] == matrices


@pytest.mark.parametrize("fields", FAMILY, ids=str)
def test_fed_rows_give_the_logits_of_the_live_network(
    make_checkpoint: MakeCheckpoint, fields: Any
) -> None:
    model = load(make_checkpoint, **fields)
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        live = model(ids).logits
        distinct, index = torch.unique(ids, return_inverse=True)
        rows = TokenRows(
            index, model.model.embed_tokens(distinct), model.model.memory_rows(distinct)
        )
        fed = model(token_rows=rows).logits
    torch.testing.assert_close(fed, live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", FAMILY, ids=str)
def test_distinct_tokens_train_like_every_position(
    make_checkpoint: MakeCheckpoint, fields: Any
) -> None:
    """Rung 10: the shortcut changes neither the loss nor any gradient."""
    model = load(make_checkpoint, **fields)
    ids = torch.randint(0, 40, (3, 33), generator=torch.Generator().manual_seed(2))
    losses, gradients = [], []
    for distinct in (True, False):
        model.model.distinct_tokens = distinct
        model.zero_grad()
        loss = next_token_loss(model(ids).logits, ids, z_loss=1e-3)
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient - other).norm() <= 1e-5 * other.norm() + 1e-9, name


def test_memory_depends_on_the_token_alone(make_checkpoint: MakeCheckpoint) -> None:
    model = load(make_checkpoint, beta=0)
    rows = model.model.memory_rows(torch.tensor([5, 9, 5]))
    assert rows.shape == (3, 2, 64)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[0], rows[2], rtol=0, atol=1e-6)
    assert (rows[0] - rows[1]).abs().max() > 0.1


def test_gain_scales_the_memory(make_checkpoint: MakeCheckpoint) -> None:
    model = load(make_checkpoint, beta=0)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = model(ids).logits
        model.config.memory_gain = [1.0, 0.0]
        muted = model(ids).logits
        index = torch.arange(12)
        rows = model.model.memory_rows(index)
        rows[:, 1] = 0
        model.config.memory_gain = None
        fed = model(token_rows=TokenRows(ids, model.model.embed_tokens(index), rows)).logits
    torch.testing.assert_close(muted, fed, rtol=0, atol=1e-5)
    assert (plain - muted).abs().max() > 1e-2


@pytest.mark.parametrize("source", ["ffn", "table", "both"])
def test_one_memory_for_all_layers_differs_by_its_gain(
    make_checkpoint: MakeCheckpoint, source: str
) -> None:
    """One row a token, fed to two layers, is what two layers with that row each compute."""
    model = load(make_checkpoint, beta=0, memory_sharing="all_layers", memory_source=source)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        live = model(ids).logits
        rows = model.model.memory_rows(ids[0])
        embedding = model.model.embed_tokens(ids[0])
        gains = model.model.token_memory.gain.clone()
        model.model.token_memory.gain.fill_(1.0)
        each = rows * gains[:, None]
        fed = model(token_rows=TokenRows(ids, embedding, each)).logits
    assert rows.shape == (12, 1, 64)
    assert gains[0] != gains[1]
    torch.testing.assert_close(fed, live, rtol=0, atol=1e-5)


def test_trained_rows_start_as_nothing() -> None:
    """With rows beside an FFN-M, the network starts as the same one without them."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 50}
    both = MemoryLLMForCausalLM(MemoryLLMConfig(**shape, memory_source="both"))
    plain = MemoryLLMForCausalLM(MemoryLLMConfig(**shape))
    plain.load_state_dict(both.state_dict(), strict=False)
    ids = torch.arange(9)[None]
    assert not both.model.token_memory.rows.weight.any()
    torch.testing.assert_close(both(ids).logits, plain(ids).logits)


def test_rows_and_gains_are_not_decayed() -> None:
    fields = {"memory_source": "both", "memory_sharing": "all_layers", "num_hidden_layers": 2}
    model = MemoryLLMForCausalLM(MemoryLLMConfig(**fields, hidden_size=32, vocab_size=50))
    trainer = object.__new__(LanguageModelTrainer)  # it needs nothing of a run for this
    decayed = trainer.get_decay_parameter_names(model)
    inside = [name for name in decayed if "token_memory" in name]
    matrices = ("gate_proj", "up_proj", "down_proj")
    assert inside == [f"model.token_memory.network.{name}.weight" for name in matrices]


@pytest.mark.parametrize("fields", FAMILY, ids=str)
def test_generate_with_and_without_cache_agree(
    make_checkpoint: MakeCheckpoint, fields: Any
) -> None:
    model = load(make_checkpoint, **fields)
    ids = torch.tensor([[10, 20, 30, 40], [7, 8, 9, 10]])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    whole = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert cached.tolist() == whole.tolist()


def test_auto_classes_save_and_load(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = load(make_checkpoint, beta=2, num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MemoryLLMConfig)
    assert (config.beta, config.rope_theta) == (2, 10_000.0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_logits_to_keep(make_checkpoint: MakeCheckpoint) -> None:
    model = load(make_checkpoint, beta=0)
    ids = torch.arange(9)[None]
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    picked = model(ids, logits_to_keep=torch.tensor([0, 4])).logits
    torch.testing.assert_close(picked, full[:, [0, 4]])


def test_tied_embeddings_share_one_tensor(make_checkpoint: MakeCheckpoint) -> None:
    model = load(make_checkpoint, beta=3, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 9}, "beta is 9"),
        ({"compute_form": "linear"}, "compute_form is 'linear'; 'swiglu' is the only one"),
        ({"compute_placement": "parallel"}, "compute_placement is 'parallel'"),
        ({"memory_norm": "none"}, "memory_norm is 'none'; use one of per_layer, shared"),
        ({"memory_source": "file"}, "memory_source is 'file'; use one of ffn, table, both"),
        ({"memory_sharing": "some"}, "memory_sharing is 'some'; use one of per_layer, all_"),
        ({"beta": 8, "memory_norm": "shared"}, "memory_norm is 'shared', but .* no memory"),
        ({"beta": 8, "memory_source": "both"}, "memory_source is 'both', but .* no memory"),
        ({"beta": 8, "memory_sharing": "all_layers"}, "memory_sharing is .* no memory"),
        ({"memory_source": "table", "memory_norm": "shared"}, "'shared', but .* no FFN-M"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"memory_gain": [1.0]}, "memory_gain has 1 numbers for 6 layers"),
        ({"hidden_act": "gelu"}, "SiLU and no biases"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type is 'yarn'"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        MemoryLLMConfig(**fields)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="There is no preset '7b'; use one of micro"):
        preset_config("7b")


def test_ids_or_rows_never_both(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ValueError, match="Give either input_ids or token_rows"):
        load(make_checkpoint, beta=0)()


def test_loss_equals_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 300, 50, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (2, 300), generator=generator)
    ours = next_token_loss(logits, labels, z_loss=1e-2)
    (gradient,) = torch.autograd.grad(ours, logits)
    kept, target = logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1)
    plain = torch.nn.functional.cross_entropy(kept, target)
    plain = plain + 1e-2 * torch.logsumexp(kept, -1).square().mean()
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_either_of_its_names(make_checkpoint: MakeCheckpoint, name: str) -> None:
    model = load(make_checkpoint, beta=0)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        held = getattr(model(ids[:, :4]), CACHE)
        rest = model(ids[:, 4:], **{name: held})
    assert CACHE not in whole
    assert (rest.logits - whole.logits[:, 4:]).abs().max() <= 1e-5
    assert getattr(rest, CACHE) is held
    assert held.get_seq_length() == 6


def test_two_caches_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    model = load(make_checkpoint, beta=0)
    caches = {name: DynamicCache() for name in ("cache", "past_key_values")}
    with pytest.raises(RequestError, match="two names of one argument"):
        model(torch.ones(1, 1, dtype=torch.long), **caches)
