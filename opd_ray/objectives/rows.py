"""What is done with the logits of a chunk of tokens: the row loss, and passes over wide rows block by block.

Suffixes: N tokens (of a chunk, in row losses), V vocabulary or columns of logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_BLOCK_NUMBERS = 2**18  # numbers that stay in a core's cache while several passes go over them


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLosses:
    """A chunk's results; row n speaks of token n."""

    loss_N: Tensor
    slope_NV: Tensor | None  # d loss_N / d logits; may be the logits' own memory; None when not asked for
    divergence_N: Tensor
    logprobs_N: Tensor | None = None  # log p(y)
    stats: dict[str, Tensor] = field(default_factory=dict)


RowLoss = Callable[[slice, Tensor, bool], RowLosses]
"""(rows of the chunk, their logits [N,V], whether slopes are wanted) -> results; may overwrite the logits."""


def common_vocabulary(vocab_size: int, *heads_VD: Tensor) -> int:
    """Return how many leading rows of the heads take part: `vocab_size`, or the rows of the smallest head when 0.

    Heads are padded to different sizes (Qwen2.5: 151,936 and 152,064 rows); ids beyond the common range are cut from
    both sides before the softmax. Raises ValueError when a head has fewer rows than vocab_size.
    """
    num_rows = min(len(head_VD) for head_VD in heads_VD)
    if vocab_size > num_rows:
        raise ValueError(f"vocab_size = {vocab_size}: expected at most {num_rows}, the rows of the smallest head")
    return vocab_size or num_rows


def widest_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 where a tensor is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def chunks(num_tokens: int, *, chunk_tokens: int) -> Iterator[slice]:
    """Yield the slices that cut num_tokens tokens into chunks; one empty slice when there are none."""
    for start in range(0, max(num_tokens, 1), chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def blocks(*tensors_NV: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same columns of all tensors, as many at a time as fit a CPU's cache; all at once on a GPU."""
    num_rows, num_columns = tensors_NV[0].shape
    size = num_columns if tensors_NV[0].is_cuda else max(256, _BLOCK_NUMBERS // max(1, num_rows))
    for start in range(0, num_columns, size):
        yield tuple(tensor[:, start : start + size] for tensor in tensors_NV)


def logsumexp(logits_NV: Tensor) -> Tensor:
    """Return log sum_v exp(logits) of each row, [N], block by block."""
    total_N = logits_NV.new_full((len(logits_NV),), -torch.inf)
    for (block_NV,) in blocks(logits_NV):
        total_N = torch.logaddexp(total_N, block_NV.logsumexp(-1))
    return total_N


def exponentiate_(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite logits with exp(logits - their largest in the row); return that largest and the new row sums, [N]."""
    largest_N, total_N = (logits_NV.new_full((len(logits_NV),), value) for value in (-torch.inf, 0.0))
    for (block_NV,) in blocks(logits_NV):
        largest_N = torch.maximum(largest_N, block_NV.amax(-1))
    for (block_NV,) in blocks(logits_NV):
        total_N += block_NV.sub_(largest_N[:, None]).exp_().sum(-1)
    return largest_N, total_N


def scale_(rows_NV: Tensor, scale_N: Tensor) -> None:
    """Multiply each row by its scale."""
    for (block_NV,) in blocks(rows_NV):
        block_NV.mul_(scale_N[:, None])


def without_masked(part: RowLosses, masked_N: Tensor) -> RowLosses:
    """Return the results without slopes, 0 where masked."""
    return RowLosses(
        loss_N=part.loss_N.masked_fill(masked_N, 0),
        slope_NV=None,
        divergence_N=part.divergence_N.masked_fill(masked_N, 0),
        logprobs_N=None if part.logprobs_N is None else part.logprobs_N.masked_fill(masked_N, 0),
        stats={
            name: value.masked_fill(masked_N.view(-1, *(1 for _ in value.shape[1:])), 0)
            for name, value in part.stats.items()
        },
    )
