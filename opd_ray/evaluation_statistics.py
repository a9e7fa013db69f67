"""Accuracy of sampled responses with what it may be off by: Wilson's interval, pass@k, a bootstrap over prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959964  # of a two-sided 95 % interval
_NUM_RESAMPLES, _SEED = 2000, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A share of right responses and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(num_right: int, num_trials: int) -> Estimate:
    """Return a proportion of independent trials with Wilson's score interval (JASA 22, 1927)."""
    p, n = num_right / num_trials, num_trials
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Estimate(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


def pass_at(k: int, *, num_samples: int, num_right: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right, 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1. Raises ValueError for k above the number of samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: expected k from 1 to {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def over_prompts(values: Sequence[float]) -> Estimate:
    """Return the mean over prompts, with the percentiles of a bootstrap over prompts: samples of one prompt agree."""
    given = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(_SEED).integers(len(given), size=(_NUM_RESAMPLES, len(given)))
    low, high = np.percentile(given[drawn].mean(axis=1), [2.5, 97.5])
    return Estimate(value=float(given.mean()), low=float(low), high=float(high))


def ks_of(num_samples: int) -> list[int]:
    """Return the k that pass@k is told for: 2, 4, ... and the number of samples; pass@1 is the mean of all."""
    powers = {2**i for i in range(1, num_samples.bit_length()) if 2**i <= num_samples}
    return sorted(powers | {num_samples}) if num_samples > 1 else []


def estimates(greedy: Sequence[float], sampled: Sequence[Sequence[float]]) -> dict[str, Estimate]:
    """Return `greedy`, `avg@n` and `pass@k` of prompts. greedy [P], sampled [P, n]: rewards; above 0.5 is right."""
    num_samples = len(sampled[0])
    right = [sum(reward > 0.5 for reward in rewards) for rewards in sampled]
    passed = {k: [pass_at(k, num_samples=num_samples, num_right=c) for c in right] for k in ks_of(num_samples)}
    return {
        "greedy": wilson(sum(reward > 0.5 for reward in greedy), len(greedy)),
        f"avg@{num_samples}": over_prompts([c / num_samples for c in right]),
        **{f"pass@{k}": over_prompts(values) for k, values in passed.items()},
    }
