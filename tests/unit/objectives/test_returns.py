"""Discounted returns against the literal double sum, in one piece and in chunks from the end."""

import pytest
import torch
from objective_oracles import naive_returns

from opd_ray.objectives.returns import ReturnsFromTheEnd, discounted_returns

OFFSETS = [[0, 9], [0, 1, 2, 9], [0, 4, 4, 8, 9], [0, 8, 9], [0, 0, 3, 9, 9]]


def costs(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("offsets", OFFSETS)
def test_returns_are_the_double_sum_within_each_sequence(discount: float, offsets: list[int]) -> None:
    expected = naive_returns(costs(9), offsets=torch.tensor(offsets), discount=discount)
    actual = discounted_returns(costs(9), offsets=torch.tensor(offsets), discount=discount)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 4, 7, 9, 20])
@pytest.mark.parametrize("discount", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("offsets", OFFSETS)
def test_chunks_from_the_end_give_the_same_returns(discount: float, offsets: list[int], chunk_tokens: int) -> None:
    returns = ReturnsFromTheEnd(offsets=torch.tensor(offsets), discount=discount)
    rows = [slice(start, min(start + chunk_tokens, 9)) for start in range(0, 9, chunk_tokens)]
    parts = [returns.of(costs(9)[each], each) for each in reversed(rows)]
    expected = naive_returns(costs(9), offsets=torch.tensor(offsets), discount=discount)
    torch.testing.assert_close(torch.cat(parts[::-1]), expected, rtol=0, atol=1e-12)


def test_a_long_sequence_keeps_float32_accuracy() -> None:
    costs_N = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    expected = costs_N.double().flip(0).cumsum(0).flip(0)
    assert (discounted_returns(costs_N, offsets=torch.tensor([0, 3000]), discount=1.0) - expected).abs().max() < 1e-4
    returns = ReturnsFromTheEnd(offsets=torch.tensor([0, 3000]), discount=1.0)
    parts = [returns.of(costs_N[start : start + 100], slice(start, start + 100)) for start in range(2900, -1, -100)]
    assert parts[0].dtype == torch.float32
    assert (torch.cat(parts[::-1]) - expected).abs().max() < 1e-4


def test_no_tokens_have_no_returns() -> None:
    assert discounted_returns(torch.empty(0), offsets=torch.tensor([0, 0]), discount=1.0).shape == (0,)
    returns = ReturnsFromTheEnd(offsets=torch.tensor([0, 0]), discount=1.0)
    assert returns.of(torch.empty(0), slice(0, 0)).shape == (0,)


def test_offsets_that_do_not_end_at_the_last_token_are_refused() -> None:
    with pytest.raises(RuntimeError):
        discounted_returns(torch.ones(5), offsets=torch.tensor([0, 3]), discount=0.5)
