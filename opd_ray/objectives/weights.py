"""Numbers that scale or centre the loss of each token, from its place, its sequence or its group.

Suffixes: N flat tokens of B sequences laid end to end, sequence b from offsets[b] to offsets[b+1] (offsets int64
[B+1], first 0, last N), T positions of the longest sequence. mask_N is bool, true: the token counts in the loss; as
weights it is the token mean. All arguments are detached: no gradient flows through a weight or a baseline.
"""

from fractions import Fraction

import torch
from torch import Tensor

from opd_ray.objectives.returns import discounted_returns

STD_EPSILON = 1e-6
MAX_DENOMINATOR = 10**6  # of a fraction of tokens; its products with token counts stay far inside int64


def sequence_mean_weights(mask_N: Tensor, *, offsets: Tensor) -> Tensor:
    """Return 1 / (number of kept tokens of the sequence) at kept tokens and 0 elsewhere, float32 [N]."""
    count_N = torch.repeat_interleave(_num_kept(mask_N, offsets=offsets), offsets.diff(), output_size=len(mask_N))
    return mask_N / count_N.clamp(min=1)


def position_weights(offsets: Tensor, *, half_life: float) -> Tensor:
    """Return 0.5^(t / half_life), t the token's position in its response from 0, float32 [N].

    half_life is in tokens; infinity weights all tokens alike.
    """
    if not half_life > 0:
        raise ValueError(f"half_life is {half_life}, expected a number of tokens above 0")
    return torch.exp2(-_position(offsets) / half_life)


def drift_weights(log_ratios_N: Tensor, *, offsets: Tensor, rate: float) -> Tensor:
    """Return exp(-rate * max(0, D_t)), D_t = sum over t' < t in the same sequence of log_ratios_t', [N].

    log_ratios_N are log p - log q of the sampled tokens in nats, 0 where masked; rate is per nat. D_t is the
    discrepancy that the prefix of token t has accumulated: a prefix on which the teacher agrees keeps weight 1, one
    that has drifted away from it weighs less. In the spirit of arXiv 2606.22600 (importance-weighted OPD); this exact
    form is ours.
    """
    if not 0 <= rate < float("inf"):
        raise ValueError(f"rate is {rate}, expected a finite number of at least 0")
    reversed_offsets = len(log_ratios_N) - offsets.flip(0)
    through_N = discounted_returns(log_ratios_N.flip(0), offsets=reversed_offsets, discount=1.0).flip(0)
    before_N = through_N.roll(1).where(_position(offsets) > 0, 0)
    return torch.exp(-rate * before_N.clamp(min=0))


def num_top_entropy(mask_N: Tensor, *, offsets: Tensor, fraction: float) -> Tensor:
    """Return how many tokens `top_entropy_kept` keeps in each sequence: ceil(fraction * kept by mask_N), int64 [B].

    The fraction, above 0 and at most 1, is read as the nearest ratio of integers with a denominator up to 10^6: 0.1
    of 10 tokens is 1, as written, and not the ceiling of a rounding error.
    """
    ratio = Fraction(fraction).limit_denominator(MAX_DENOMINATOR) if 0 < fraction <= 1 else Fraction(0)
    if ratio == 0:
        raise ValueError(f"fraction is {fraction}, expected at least {1 / MAX_DENOMINATOR} and at most 1")
    scaled_B = _num_kept(mask_N, offsets=offsets) * ratio.numerator
    return torch.div(scaled_B + ratio.denominator - 1, ratio.denominator, rounding_mode="floor")


def top_entropy_kept(entropies_N: Tensor, *, offsets: Tensor, mask_N: Tensor, fraction: float) -> Tensor:
    """Return true at the tokens with the largest entropies among those of their sequence in mask_N, bool [N].

    Each sequence keeps exactly `num_top_entropy` of them; of equal entropies the earlier token goes first.
    """
    num_tokens = len(entropies_N)
    sequence_N = _sequence(offsets)
    # By sequence, in it tokens of mask_N first, then by falling entropy: stable sorts, the last key decides first.
    order_N = entropies_N.argsort(descending=True, stable=True)
    order_N = order_N[(2 * sequence_N + ~mask_N)[order_N].argsort(stable=True)]
    num_kept_B = num_top_entropy(mask_N, offsets=offsets, fraction=fraction)
    num_kept_N = torch.repeat_interleave(num_kept_B, offsets.diff(), output_size=num_tokens)
    return torch.empty_like(mask_N).scatter(0, order_N, _position(offsets) < num_kept_N)


def leave_one_out_returns(returns_N: Tensor, *, offsets: Tensor, group_B: Tensor) -> Tensor:
    """Return the mean return of the other sequences of the group at the same position, [N]: a baseline.

    returns_N are finite, also at masked tokens. group_B int64 [B] names each sequence's group, in any order. A sequence
    that has ended counts with return 0; a group of one has baseline 0. The baseline does not depend on the token's own
    sequence, so subtracting it leaves the expected gradient unchanged. Takes B^2 T multiply-adds and [B,T] numbers.
    """
    if len(returns_N) == 0:
        return returns_N
    at_BT = _sequence(offsets), _position(offsets)
    returns_BT = returns_N.new_zeros(len(group_B), int(offsets.diff().max()))
    returns_BT[at_BT] = returns_N
    # Not (sum of the group - own): the own return must not come back as a rounding error.
    is_other_BB = (group_B[:, None] == group_B).fill_diagonal_(False)
    num_others_B = is_other_BB.sum(1).clamp(min=1)
    mean_BT = is_other_BB.to(returns_N.dtype) @ returns_BT / num_others_B[:, None]
    return mean_BT[at_BT]


def group_normalised(rewards_B: Tensor, *, group_B: Tensor) -> Tensor:
    """Return (reward - mean of its group) / (population std of its group + 1e-6), [B] (GRPO, arXiv 2402.03300).

    rewards_B is floating; group_B int64 [B] names each sequence's group. A group of one, or of equal rewards, gives 0.
    """
    # Above the lowest of the group, so that equal rewards are exactly 0 and no rounding error meets the epsilon.
    above_B = rewards_B - _of_group(rewards_B, group_B=group_B, reduction="amin")
    centred_B = above_B - _of_group(above_B, group_B=group_B, reduction="mean")
    std_B = _of_group(centred_B.square(), group_B=group_B, reduction="mean").sqrt()
    return centred_B / (std_B + STD_EPSILON)


def _num_kept(mask_N: Tensor, *, offsets: Tensor) -> Tensor:
    """Return the number of true tokens of each sequence, int64 [B]."""
    num_before = torch.cat([offsets.new_zeros(1), mask_N.cumsum(0)])  # [N+1]
    return num_before[offsets].diff()


def _sequence(offsets: Tensor) -> Tensor:
    """Return the index of each token's sequence, int64 [N]."""
    return torch.repeat_interleave(offsets.diff())


def _position(offsets: Tensor) -> Tensor:
    """Return each token's position in its sequence from 0, int64 [N]."""
    start_N = torch.repeat_interleave(offsets[:-1], offsets.diff())
    return torch.arange(len(start_N), device=offsets.device) - start_N


def _of_group(values_B: Tensor, *, group_B: Tensor, reduction: str) -> Tensor:
    """Return to each sequence the reduction of the values of its group, [B]."""
    group_index_B = group_B.unique(return_inverse=True)[1]
    reduced = torch.zeros_like(values_B).scatter_reduce(0, group_index_B, values_B, reduction, include_self=False)
    return reduced[group_index_B]
