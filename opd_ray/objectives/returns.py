"""Discounted sums of costs to the end of each sequence."""

import torch
from torch import Tensor


def discounted_returns(costs_N: Tensor, *, offsets: Tensor, discount: float) -> Tensor:
    """Return R_t = sum over t' >= t in the same sequence of discount^(t' - t) * cost_t', [N].

    offsets [B+1] bounds the B sequences over N. t' - t counts positions, whether or not the tokens between them cost
    anything; the caller sets the cost of a masked token to 0. discount 0 returns the costs (0^0 = 1).

    Doubling: after step k each token holds the sum over its next 2^k tokens. That is log2(N) vector operations
    without a device synchronisation, whatever the lengths, and without the cancellation of differences of cumulated
    sums.
    """
    num_tokens = len(costs_N)
    end_N = torch.repeat_interleave(offsets[1:], offsets.diff(), output_size=num_tokens)
    position_N = torch.arange(num_tokens, device=costs_N.device)
    returns_N = costs_N
    stride = 1
    while stride < num_tokens and discount**stride > 0:
        same_sequence = position_N[stride:] < end_N[:-stride]
        later = (returns_N[stride:] * discount**stride).where(same_sequence, 0)
        returns_N = torch.cat([returns_N[:-stride] + later, returns_N[-stride:]])
        stride *= 2
    return returns_N


class ReturnsFromTheEnd:
    """`discounted_returns` of consecutive chunks of tokens, last chunk first."""

    def __init__(self, *, offsets: Tensor, discount: float) -> None:
        self._offsets = offsets
        self._discount = discount
        self._later: Tensor | None = None  # [] return of the first token after the chunk, 0-dimensional

    def of(self, costs_N: Tensor, rows: slice) -> Tensor:
        """Return the returns [N] of the tokens rows.start to rows.stop, which end where the last call's began."""
        if self._discount == 0 or len(costs_N) == 0:
            return costs_N
        offsets = self._offsets.clamp(rows.start, rows.stop) - rows.start
        returns_N = discounted_returns(costs_N, offsets=offsets, discount=self._discount)
        if self._later is not None:
            end_N = torch.repeat_interleave(self._offsets[1:], offsets.diff(), output_size=len(costs_N))
            distance_N = torch.arange(len(costs_N), 0, -1, device=costs_N.device)
            later_N = self._discount ** distance_N.to(costs_N.dtype) * self._later
            returns_N = returns_N + later_N.where(end_N > rows.stop, 0)
        self._later = returns_N[0]
        return returns_N
