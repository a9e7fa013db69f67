"""Weights and baselines against literal loops over sequences and groups."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objectives.weights import (
    drift_weights,
    group_normalised,
    leave_one_out_returns,
    num_top_entropy,
    position_weights,
    sequence_mean_weights,
    top_entropy_kept,
)

OFFSETS = torch.tensor([0, 4, 4, 5, 9])
EMPTY = torch.tensor([0, 0])


def randn(num: int) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_sequence_mean_gives_each_sequence_with_kept_tokens_the_weight_one() -> None:
    mask_N = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    weights_N = sequence_mean_weights(mask_N, offsets=OFFSETS)
    expected = torch.tensor([1 / 3, 0, 1 / 3, 1 / 3, 0, 1 / 2, 0, 0, 1 / 2])
    torch.testing.assert_close(weights_N, expected)


def test_position_weights_halve_every_half_life_and_start_again_in_each_sequence() -> None:
    weights_N = position_weights(OFFSETS, half_life=2.0)
    expected = torch.tensor([0.5 ** (t / 2) for t in (0, 1, 2, 3, 0, 0, 1, 2, 3)])
    torch.testing.assert_close(weights_N, expected)
    assert (position_weights(OFFSETS, half_life=math.inf) == 1).all()
    for half_life in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="half_life"):
            position_weights(OFFSETS, half_life=half_life)


@pytest.mark.parametrize("rate", [0.0, 0.7])
def test_drift_weights_are_the_literal_sum_over_earlier_tokens(rate: float) -> None:
    log_ratios_N = randn(9)
    expected = torch.empty_like(log_ratios_N)
    for start, end in itertools.pairwise(OFFSETS.tolist()):
        for t in range(start, end):
            expected[t] = math.exp(-rate * max(0.0, float(log_ratios_N[start:t].sum())))
    actual = drift_weights(log_ratios_N, offsets=OFFSETS, rate=rate)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_drift_leaves_the_first_token_and_agreeing_prefixes_alone_and_never_looks_ahead() -> None:
    offsets = torch.tensor([0, 3, 6])
    log_ratios_N = torch.tensor([-1.0, -1.0, 5.0, 2.0, 0.0, 9.0])
    weights_N = drift_weights(log_ratios_N, offsets=offsets, rate=1.0)
    torch.testing.assert_close(weights_N, torch.tensor([1, 1, 1, 1, math.exp(-2), math.exp(-2)]))


def test_a_huge_drift_in_one_sequence_costs_no_precision_in_the_next() -> None:
    log_ratios_N = torch.tensor([1e9, 1e9, 0.1, 0.1, 0.1])
    weights_N = drift_weights(log_ratios_N, offsets=torch.tensor([0, 2, 5]), rate=1.0)
    torch.testing.assert_close(weights_N[2:], torch.tensor([1, math.exp(-0.1), math.exp(-0.2)]))


def test_a_rate_that_is_no_finite_number_from_zero_on_is_refused() -> None:
    for rate in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate"):
            drift_weights(torch.zeros(9), offsets=OFFSETS, rate=rate)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_largest_entropies_are_kept_as_the_sorted_loop_keeps_them(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    bounds, num_tokens = [0, *itertools.accumulate(lengths)], sum(lengths)
    entropies = data.draw(st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0]), min_size=num_tokens, max_size=num_tokens))
    mask = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    percent = data.draw(st.integers(1, 100))
    expected, counts = [False] * num_tokens, []
    for start, end in itertools.pairwise(bounds):
        unmasked = [t for t in range(start, end) if mask[t]]
        counts.append(math.ceil(Fraction(percent, 100) * len(unmasked)))
        for t in sorted(unmasked, key=lambda t: (-entropies[t], t))[: counts[-1]]:
            expected[t] = True
    offsets, mask_N = torch.tensor(bounds), torch.tensor(mask, dtype=torch.bool)
    fraction = percent / 100
    keep_N = top_entropy_kept(torch.tensor(entropies), offsets=offsets, mask_N=mask_N, fraction=fraction)
    assert keep_N.tolist() == expected
    assert num_top_entropy(mask_N, offsets=offsets, fraction=fraction).tolist() == counts


@pytest.mark.parametrize(("fraction", "num", "expected"), [(0.1, 10, 1), (0.07, 100, 7), (1 / 3, 9, 3), (1e-6, 5, 1)])
def test_the_kept_count_is_the_ceiling_of_the_fraction_as_written(fraction: float, num: int, expected: int) -> None:
    mask_N, offsets = torch.ones(num, dtype=torch.bool), torch.tensor([0, num])
    assert num_top_entropy(mask_N, offsets=offsets, fraction=fraction).tolist() == [expected]
    keep_N = top_entropy_kept(torch.rand(num), offsets=offsets, mask_N=mask_N, fraction=fraction)
    assert keep_N.sum() == expected


def test_every_count_of_a_percentage_up_to_a_thousand_tokens_is_exact() -> None:
    offsets = torch.arange(1001).cumsum(0)  # sequences of 1 to 1000 tokens
    mask_N = torch.ones(int(offsets[-1]), dtype=torch.bool)
    for percent in range(1, 101):
        counts_B = num_top_entropy(mask_N, offsets=offsets, fraction=percent / 100)
        assert counts_B.tolist() == [-(-percent * num // 100) for num in range(1, 1001)]


def test_infinite_and_undefined_entropies_keep_the_counts_and_the_mask() -> None:
    entropies_N = torch.tensor([-math.inf, math.nan, math.inf, -math.inf])
    mask_N = torch.tensor([True, True, False, True])
    for fraction, expected in ((0.3, 1), (0.5, 2), (1.0, 3)):
        keep_N = top_entropy_kept(entropies_N, offsets=torch.tensor([0, 4]), mask_N=mask_N, fraction=fraction)
        assert keep_N.sum() == expected
        assert not keep_N[2]


def test_a_fraction_outside_zero_to_one_is_refused() -> None:
    for fraction in (0.0, 1e-9, 1.1, -0.5, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            num_top_entropy(torch.ones(9, dtype=torch.bool), offsets=OFFSETS, fraction=fraction)


def naive_leave_one_out(returns_N: Tensor, *, offsets: Tensor, group_B: Tensor) -> Tensor:
    rows = [returns_N[start:end].tolist() for start, end in itertools.pairwise(offsets.tolist())]
    groups = group_B.tolist()
    baseline = []
    for own, row in enumerate(rows):
        others = [rows[b] for b in range(len(rows)) if groups[b] == groups[own] and b != own]
        for k in range(len(row)):
            at_k = [other[k] if k < len(other) else 0.0 for other in others]
            baseline.append(sum(at_k) / len(at_k) if at_k else 0.0)
    return torch.tensor(baseline, dtype=returns_N.dtype)


@pytest.mark.parametrize("groups", [[5, 5, 5, 5, 5], [1, 0, 1, 0, 1], [3, -2, 7, 7, 3], [0, 1, 2, 3, 4]])
def test_the_baseline_is_the_mean_of_the_other_sequences_at_the_same_position(groups: list[int]) -> None:
    returns_N, offsets, group_B = randn(12), torch.tensor([0, 3, 3, 5, 11, 12]), torch.tensor(groups)
    actual = leave_one_out_returns(returns_N, offsets=offsets, group_B=group_B)
    expected = naive_leave_one_out(returns_N, offsets=offsets, group_B=group_B)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_own_returns_do_not_change_the_own_baseline_by_a_single_bit() -> None:
    returns_N = randn(9).float()
    offsets, group_B = torch.tensor([0, 3, 6, 9]), torch.tensor([1, 1, 1])
    baseline_N = leave_one_out_returns(returns_N, offsets=offsets, group_B=group_B)
    changed_N = returns_N.clone()
    changed_N[3:6] = 1e8
    changed = leave_one_out_returns(changed_N, offsets=offsets, group_B=group_B)
    assert torch.equal(changed[3:6], baseline_N[3:6])
    assert not torch.isclose(changed[:3], baseline_N[:3]).any()


def test_the_baseline_leaves_the_expected_gradient_unchanged_by_enumeration() -> None:
    """Two samples of two tokens from a table: sum over all pairs of p(pair) * baseline_t * score_t is 0."""
    logits_PV = randn(12).reshape(4, 3).requires_grad_()  # row 0 first token, row 1 + y0 second token
    costs_PV = randn(24)[12:].reshape(4, 3)
    sequences = list(itertools.product(range(3), repeat=2))
    log_p_PV = logits_PV.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(sequences, repeat=2):
        cells = [cell for y0, y1 in pair for cell in ((0, y0), (1 + y0, y1))]
        log_p_N = torch.stack([log_p_PV[cell] for cell in cells])
        costs_N = torch.stack([costs_PV[cell] for cell in cells])
        returns_N = torch.stack([costs_N[0] + costs_N[1], costs_N[1], costs_N[2] + costs_N[3], costs_N[3]])
        baseline_N = leave_one_out_returns(returns_N, offsets=torch.tensor([0, 2, 4]), group_B=torch.tensor([0, 0]))
        total = total + log_p_N.detach().sum().exp() * (baseline_N * log_p_N).sum()
    (gradient_PV,) = torch.autograd.grad(total, logits_PV)
    assert gradient_PV.abs().max() < 1e-12


def test_group_normalised_is_the_score_in_population_standard_deviations() -> None:
    rewards_B = torch.tensor([1.0, 5.0, 0.0, 7.0, 2.0])
    group_B = torch.tensor([4, 9, 4, 9, 4])
    std = math.sqrt(2 / 3)
    expected = torch.tensor([0.0, -1.0, -1 / std, 1.0, 1 / std])
    torch.testing.assert_close(group_normalised(rewards_B, group_B=group_B), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, -123.4])
@pytest.mark.parametrize("num", [1, 3, 7, 11])
def test_equal_rewards_give_exactly_zero_although_their_mean_is_rounded(reward: float, num: int) -> None:
    rewards_B = torch.tensor([*[reward] * num, 5.0])
    assert (group_normalised(rewards_B, group_B=torch.tensor([*[0] * num, 1])) == 0).all()


def test_no_tokens_and_no_sequences_are_no_special_case() -> None:
    none_N, mask_N = torch.empty(0), torch.empty(0, dtype=torch.bool)
    assert sequence_mean_weights(mask_N, offsets=EMPTY).shape == (0,)
    assert position_weights(EMPTY, half_life=1.0).shape == (0,)
    assert drift_weights(none_N, offsets=EMPTY, rate=1.0).shape == (0,)
    assert top_entropy_kept(none_N, offsets=EMPTY, mask_N=mask_N, fraction=0.5).shape == (0,)
    assert num_top_entropy(mask_N, offsets=EMPTY, fraction=0.5).tolist() == [0]
    assert leave_one_out_returns(none_N, offsets=EMPTY, group_B=torch.tensor([0])).shape == (0,)
    assert group_normalised(none_N, group_B=torch.empty(0, dtype=torch.int64)).shape == (0,)
