"""Rows out of few occurrences: the closed form is that of leaving each one out."""

from __future__ import annotations

import pytest
import torch

from edge_memllm.modeling.token_means import STRENGTHS, Occurrences, leave_one_out, token_means


def drawn(noise: float, tokens: int = 40, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of tokens that occur 1 to 9 times, scattered about a row of each."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(tokens).repeat_interleave(1 + torch.arange(tokens) % 9)
    rows = torch.randn(tokens, width, generator=generator)
    scatter = torch.randn(len(index), width, generator=generator)
    return index, rows[index] + noise * scatter + 3


def seen_of(index: torch.Tensor, values: torch.Tensor, tokens: int = 40) -> Occurrences:
    seen = Occurrences.none(tokens, values.shape[1], values)
    for part, those in zip(index.split(50), values.split(50), strict=True):
        seen.add(part, those)
    return seen


@pytest.mark.parametrize("strength", [0.25, 2.0, 64.0])
def test_the_closed_form_is_that_of_leaving_one_out(strength: float) -> None:
    index, values = drawn(1.0)
    missed = 0.0
    for place in range(len(values)):
        others = (index == index[place]).nonzero().flatten()
        others = others[others != place]
        foretold = values[others].sum(dim=0) / (len(others) + strength)
        missed += float((values[place] - foretold).square().sum())
    found = leave_one_out(seen_of(index, values), strength)
    assert float(found) == pytest.approx(missed, rel=1e-5)


def test_the_noisier_the_values_the_stronger_the_prior() -> None:
    strengths = []
    for noise in (0.1, 1.0, 5.0):
        seen = seen_of(*drawn(noise))
        strengths.append(token_means(seen, [seen.mean()]).strength)
    assert strengths == sorted(strengths)
    assert strengths[0] == STRENGTHS[0] < strengths[2]


def test_tokens_that_were_not_seen_get_the_prior_and_the_better_prior_is_taken() -> None:
    index, values = drawn(2.0)
    seen = seen_of(index, values, tokens=42)
    good = torch.zeros(42, 6).index_add_(0, index, values) / seen.counts.clamp(min=1).unsqueeze(1)
    good[40:] = 7.0
    best = token_means(seen, [seen.mean(), good.float()])
    assert best.prior == 1
    assert torch.equal(best.rows[40:], torch.full((2, 6), 7.0))
    assert token_means(seen, [good.float(), seen.mean()]).error == best.error


def test_no_prior_is_refused() -> None:
    with pytest.raises(ValueError, match="no prior is given"):
        token_means(seen_of(*drawn(1.0)), [])
