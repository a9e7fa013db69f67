"""Estimates and their intervals against enumeration and closed forms."""

from itertools import combinations

import numpy as np
import pytest

from opd_ray.evaluation_statistics import estimates, ks_of, over_prompts, pass_at, wilson


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_draws_of_k_that_hold_a_right_one(num_samples: int):
    for num_right in range(num_samples + 1):
        rights = [i < num_right for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            draws = [any(draw) for draw in combinations(rights, k)]
            expected = sum(draws) / len(draws)
            assert pass_at(k, num_samples=num_samples, num_right=num_right) == pytest.approx(expected, abs=1e-15)


def test_pass_at_more_than_the_samples_is_refused():
    with pytest.raises(ValueError, match="expected k from 1 to 4"):
        pass_at(5, num_samples=4, num_right=1)


@pytest.mark.parametrize(
    ("num_right", "num_trials", "low", "high"),
    [(8, 10, 0.49016, 0.94332), (0, 10, 0.0, 0.27754), (10, 10, 0.72247, 1.0), (50, 100, 0.40383, 0.59617)],
)
def test_wilsons_interval_is_that_of_the_tables(num_right: int, num_trials: int, low: float, high: float):
    estimate = wilson(num_right, num_trials)
    assert estimate.value == num_right / num_trials
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-4)


def test_wilsons_interval_holds_the_truth_as_often_as_it_says():
    generator, p = np.random.default_rng(1), 0.3
    held = [e.low <= p <= e.high for e in (wilson(int(n), 60) for n in generator.binomial(60, p, size=2000))]
    assert 0.93 < np.mean(held) < 0.97


def test_the_interval_over_prompts_holds_the_truth_though_samples_of_a_prompt_agree():
    generator, held = np.random.default_rng(2), []
    for _ in range(200):
        chances = generator.beta(0.5, 0.5, size=80)  # prompts are easy or hard: samples of one are all but copies
        values = generator.binomial(4, chances) / 4
        estimate = over_prompts(list(values))
        held.append(estimate.low <= 0.5 <= estimate.high)
    assert 0.88 < np.mean(held) <= 0.99


def test_the_measures_of_a_few_prompts():
    result = estimates([1.0, 0.0], [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert {name: e.value for name, e in result.items()} == {
        "greedy": 0.5,
        "avg@4": 0.125,
        "pass@2": 0.25,
        "pass@4": 0.5,
    }
    assert all(0 <= e.low <= e.value <= e.high <= 1 for e in result.values())


@pytest.mark.parametrize(("num_samples", "ks"), [(1, []), (2, [2]), (4, [2, 4]), (6, [2, 4, 6]), (8, [2, 4, 8])])
def test_which_k_are_told(num_samples: int, ks: list[int]):
    assert ks_of(num_samples) == ks
