"""Discounted returns against the literal double sum."""

import pytest
import torch
from objective_oracles import naive_returns

from opd_ray.objectives.returns import discounted_returns


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("offsets", [[0, 9], [0, 1, 2, 9], [0, 4, 4, 8, 9], [0, 8, 9]])
def test_returns_are_the_double_sum_within_each_sequence(discount: float, offsets: list[int]) -> None:
    costs_N = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = naive_returns(costs_N, offsets=torch.tensor(offsets), discount=discount)
    actual = discounted_returns(costs_N, offsets=torch.tensor(offsets), discount=discount)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_a_long_sequence_keeps_float32_accuracy() -> None:
    costs_N = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    actual = discounted_returns(costs_N, offsets=torch.tensor([0, 3000]), discount=1.0)
    expected = costs_N.double().flip(0).cumsum(0).flip(0)
    assert (actual - expected).abs().max() < 1e-4


def test_no_tokens_have_no_returns() -> None:
    assert discounted_returns(torch.empty(0), offsets=torch.tensor([0, 0]), discount=1.0).shape == (0,)


def test_offsets_that_do_not_end_at_the_last_token_are_refused() -> None:
    with pytest.raises(RuntimeError):
        discounted_returns(torch.ones(5), offsets=torch.tensor([0, 3]), discount=0.5)
