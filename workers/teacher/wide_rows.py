"""Exact log-softmax and top-K of rows over the whole vocabulary, in few passes over them.

Suffixes: N rows, W columns (whole groups of neighbours), B groups, C columns of K groups.
"""

import torch
from torch import Tensor

GROUP_COLUMNS = 32


def padded_size(num_columns: int) -> int:
    """Return the columns of whole groups that hold so many."""
    return -(-num_columns // GROUP_COLUMNS) * GROUP_COLUMNS


def log_softmax(logits_NW: Tensor) -> Tensor:
    """Return the log-softmax of each row; on a CPU in the same memory."""
    # torch reads a row three times and writes it once while it is in cache; logsumexp goes through memory four times.
    out: Tensor = torch.log_softmax(logits_NW, -1, out=None if logits_NW.is_cuda else logits_NW)
    return out


def top_k(numbers_NW: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Return columns and values [N,K] of the largest numbers of each row, descending; NaN counts as the largest.

    They lie in the K groups with the largest maxima: a number of another group is at most that group's maximum, and K
    groups have one at least as large.
    """
    num_rows, num_groups = len(numbers_NW), numbers_NW.shape[1] // GROUP_COLUMNS
    if k == 0 or k >= num_groups:
        values_NK, columns_NK = numbers_NW.topk(k)
        return columns_NK, values_NK
    maxima_NB = numbers_NW.unflatten(1, (-1, GROUP_COLUMNS)).amax(-1)
    groups_NK = maxima_NB.topk(k, sorted=False).indices
    first_N1 = torch.arange(0, num_rows * num_groups, num_groups, device=groups_NK.device)[:, None]
    groups = numbers_NW.view(-1, GROUP_COLUMNS)
    candidates_NC = groups.index_select(0, (groups_NK + first_N1).flatten()).view(num_rows, -1)
    values_NK, places_NK = candidates_NC.topk(k)
    columns_NK = groups_NK.gather(1, places_NK // GROUP_COLUMNS) * GROUP_COLUMNS + places_NK % GROUP_COLUMNS
    return columns_NK, values_NK
