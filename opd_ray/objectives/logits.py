"""Log-probs from hidden states and a head, without ever holding them for all tokens.

Suffixes: N tokens (of a chunk, in `log_probs`), K ids per token, V vocabulary, D hidden size. Logits are computed in
the promoted dtype: at least float32, and float64 where an input is.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_ray.objectives.objective import ObjectiveOptions


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


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products keep their dtype, also when the caller runs under autocast."""
    context: AbstractContextManager[Any] = torch.autocast(device_type=tensor.device.type, enabled=False)
    return context


def log_probs(hidden_ND: Tensor, head_VD: Tensor, *, mask_N: Tensor, temperature: float) -> Tensor:
    """Return log softmax(hidden @ head.T / temperature), [N,V]; masked tokens get log(1/V) and pass no gradient.

    The states of masked tokens are not read, so they may hold anything, NaN included.
    """
    dtype = widest_dtype(hidden_ND, head_VD)
    with no_autocast(hidden_ND):
        scaled_ND = hidden_ND.to(dtype).masked_fill(~mask_N[:, None], 0) / temperature
        return (scaled_ND @ head_VD.to(dtype).T).log_softmax(dim=-1)


def at_sampled(log_p_NV: Tensor, *, ids_N: Tensor, mask_N: Tensor) -> Tensor:
    """Return log p of the sampled token, [N]; exactly 0 and without gradient where masked."""
    ids_N1 = ids_N.masked_fill(~mask_N, 0)[:, None]
    return log_p_NV.gather(-1, ids_N1).squeeze(-1).masked_fill(~mask_N, 0)


def token_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, *, ids_N: Tensor, mask_N: Tensor, options: ObjectiveOptions
) -> Tensor:
    """Return the student's log p(y_t) over the common vocabulary, [N], differentiable; 0 where masked."""
    vocab_size = common_vocabulary(options.vocab_size, head_VD)
    # Cast before the chunks: their gradients then add up in the wide dtype, not in the head's.
    wide_head_VD = head_VD[:vocab_size].to(widest_dtype(hidden_ND, head_VD))

    def of_chunk(rows: slice) -> tuple[Tensor]:
        mask = mask_N[rows]
        log_p = log_probs(hidden_ND[rows], wide_head_VD, mask_N=mask, temperature=options.temperature)
        return (at_sampled(log_p, ids_N=ids_N[rows], mask_N=mask),)

    return map_chunks(of_chunk, num_tokens=len(ids_N), chunk_tokens=options.chunk_tokens)[0]


def chunks(*, num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Yield the slices that cut num_tokens tokens into chunks; one empty slice when there are none."""
    for start in range(0, max(num_tokens, 1), chunk_tokens):
        yield slice(start, start + chunk_tokens)


def map_chunks(
    function: Callable[[slice], tuple[Tensor, ...]], *, num_tokens: int, chunk_tokens: int
) -> tuple[Tensor, ...]:
    """Return the concatenated results of a function of a chunk's rows.

    Nothing that the function makes survives it but its results: the backward pass computes each chunk anew, which
    costs a second product with the head. Gradients reach the tensors that the function closes over.
    """
    results = [
        checkpoint(function, rows, use_reentrant=False, preserve_rng_state=False)
        for rows in chunks(num_tokens=num_tokens, chunk_tokens=chunk_tokens)
    ]
    return tuple(torch.cat(column) for column in zip(*results, strict=True))
