"""Logits at a few chosen ids per token, without a product with the whole head.

Suffixes: N tokens, K ids per token, V vocabulary, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from opd_ray.objectives.logits import chunks, no_autocast, widest_dtype


class _GatheredLogits(torch.autograd.Function):  # type: ignore[misc]  # mypy does not follow torch
    """z[n,k] = hidden[n] . head[ids[n,k]], in chunks both ways.

    Indexing under autograd would keep [N,K,D] rows for the backward pass and make a [V,D] gradient for each chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, ids_NK: Tensor, chunk_tokens: int) -> Tensor:
        ctx.save_for_backward(hidden_ND, head_VD, ids_NK)
        ctx.chunk_tokens = chunk_tokens
        dtype = widest_dtype(hidden_ND, head_VD)
        logits_NK = torch.empty(ids_NK.shape, dtype=dtype, device=hidden_ND.device)
        with no_autocast(hidden_ND):
            for rows in chunks(num_tokens=len(ids_NK), chunk_tokens=chunk_tokens):
                head_nKD = head_VD[ids_NK[rows]].to(dtype)
                logits_NK[rows] = (head_nKD @ hidden_ND[rows].to(dtype)[:, :, None]).squeeze(-1)
        return logits_NK

    @staticmethod
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, head_VD, ids_NK = ctx.saved_tensors
        dtype = grad_NK.dtype
        grad_hidden_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=dtype) if ctx.needs_input_grad[1] else None
        with no_autocast(hidden_ND):
            for rows in chunks(num_tokens=len(ids_NK), chunk_tokens=ctx.chunk_tokens):
                ids_nK, grad_nK = ids_NK[rows], grad_NK[rows]
                if grad_hidden_ND is not None:
                    grad_hidden_ND[rows] = (grad_nK[:, None, :] @ head_VD[ids_nK].to(dtype)).squeeze(1)
                if grad_head_VD is not None:
                    grad_nKD = grad_nK[:, :, None] * hidden_ND[rows].to(dtype)[:, None, :]
                    grad_head_VD.index_add_(0, ids_nK.flatten(), grad_nKD.flatten(0, 1))
        return grad_hidden_ND, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype), None, None


def gathered_logits(hidden_ND: Tensor, head_VD: Tensor, *, ids_NK: Tensor, chunk_tokens: int) -> Tensor:
    """Return z[n,k] = hidden[n] . head[ids[n,k]], [N,K], at least float32, differentiable in hidden and head.

    Costs K D multiply-adds per token each way, and touches only the named rows of the head and of its gradient.
    """
    logits_NK: Tensor = _GatheredLogits.apply(hidden_ND, head_VD, ids_NK, chunk_tokens)
    return logits_NK
