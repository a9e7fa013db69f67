"""Exact log-sum-exp and top-K of wide rows, in few passes over them.

The K largest numbers of a row lie in the K groups with the largest maxima: a number of another group is at most that
group's maximum, and K groups have one at least as large. The maxima serve the log-sum-exp as well.

Suffixes: N rows, W columns (whole groups of neighbours), B groups, C columns of K groups.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

GROUP_COLUMNS = 32
_BLOCK_NUMBERS = 2**18  # numbers that stay in a core's cache while several passes go over them


def padded_size(num_columns: int) -> int:
    """Return the columns of whole groups that hold so many."""
    return -(-num_columns // GROUP_COLUMNS) * GROUP_COLUMNS


def read_rows(logits_NW: Tensor) -> tuple[Tensor, Tensor]:
    """Return log sum_w exp(logits) of each row, [N,1], and the maximum of each group, [N,B]; no row is all -inf."""
    num_rows, num_columns = logits_NW.shape
    maxima_NB = logits_NW.new_empty(num_rows, num_columns // GROUP_COLUMNS)
    for columns, groups in _blocks(logits_NW):
        torch.amax(logits_NW[:, columns].unflatten(1, (-1, GROUP_COLUMNS)), -1, out=maxima_NB[:, groups])
    largest_N1 = maxima_NB.amax(-1, keepdim=True)
    sum_N1 = torch.zeros_like(largest_N1)
    for columns, _ in _blocks(logits_NW):
        sum_N1 += (logits_NW[:, columns] - largest_N1).exp_().sum(-1, keepdim=True)
    return largest_N1 + sum_N1.log(), maxima_NB


def top_k(logits_NW: Tensor, maxima_NB: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Return columns and values [N,K] of the largest numbers of each row, descending; NaN counts as the largest."""
    num_rows, num_groups = maxima_NB.shape
    if k >= num_groups:
        values_NK, columns_NK = logits_NW.topk(k)
        return columns_NK, values_NK
    groups_NK = maxima_NB.topk(k, sorted=False).indices
    first_N1 = torch.arange(0, num_rows * num_groups, num_groups, device=groups_NK.device)[:, None]
    groups = logits_NW.view(-1, GROUP_COLUMNS)
    candidates_NC = groups.index_select(0, (groups_NK + first_N1).flatten()).view(num_rows, -1)
    values_NK, places_NK = candidates_NC.topk(k)
    columns_NK = groups_NK.gather(1, places_NK // GROUP_COLUMNS) * GROUP_COLUMNS + places_NK % GROUP_COLUMNS
    return columns_NK, values_NK


def _blocks(logits_NW: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of columns and of their groups: as many as fit a CPU's cache; all at once on a GPU."""
    num_rows, num_columns = logits_NW.shape
    size = (
        num_columns if logits_NW.is_cuda else max(8, _BLOCK_NUMBERS // max(1, num_rows * GROUP_COLUMNS)) * GROUP_COLUMNS
    )
    for start in range(0, num_columns, size):
        end = min(start + size, num_columns)
        yield slice(start, end), slice(start // GROUP_COLUMNS, end // GROUP_COLUMNS)
