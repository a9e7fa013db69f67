"""The student's head in chunks of tokens: logits of a chunk, a loss on them, and its gradients in the same pass.

Nothing of size [N,V] is held, and nothing is computed twice: while a chunk's logits are there, the row loss turns
them into d loss / d logits, which is multiplied into the gradients at once.

Suffixes: N tokens (of a chunk, inside), V vocabulary or columns of logits, K ids per token, D hidden size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opd_ray.objectives.objective import Losses, ObjectiveOptions
from opd_ray.objectives.rows import RowLoss, RowLosses, chunks, widest_dtype, without_masked
from opd_ray.objectives.signals import HiddenSignal, Tokens

_MAX_GATHERED_NUMBERS = 2**24  # head rows of a chunk of tokens that are held at once


class Head(Protocol):
    """Logits of a chunk, and the way back."""

    chunk_tokens: int
    gradient_VD: Tensor | None  # accumulates; of all rows of the head

    def logits(self, rows: slice, hidden_ND: Tensor) -> Tensor:
        """Return logits [N,V] of the chunk's states; the next call may overwrite them."""

    def backward(self, slope_NV: Tensor, hidden_ND: Tensor, weights_N: Tensor) -> Tensor:
        """Add the chunk's part to the head's gradient and return d sum(weights * loss) / d states [N,D]."""


class WholeHead:
    """Every row of the head: three products with it per token, logits and both gradients."""

    def __init__(self, head_VD: Tensor, *, vocab_size: int, dtype: torch.dtype, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._num_rows = len(head_VD)
        self._vocab_size = vocab_size
        self._mixed = head_VD.is_cuda and head_VD.dtype in (torch.bfloat16, torch.float16)
        self._head_VD = head_VD.detach()[:vocab_size].to(head_VD.dtype if self._mixed else dtype)
        self._dtype = dtype
        self._buffer: Tensor | None = None
        self.gradient_VD: Tensor | None = None

    def logits(self, rows: slice, hidden_ND: Tensor) -> Tensor:  # noqa: ARG002 - the whole head serves all rows
        """Return logits [N,V] in the compute dtype."""
        if self._mixed:  # tensor cores multiply 16-bit numbers and add in float32
            return torch.mm(hidden_ND.to(self._head_VD.dtype), self._head_VD.T, out_dtype=self._dtype)
        # One buffer for all chunks: fresh memory costs as much as the arithmetic on it. It holds the transpose,
        # [V,N]: a CPU's product then need not repack the head for every chunk, a fifth of its time at 200 tokens.
        num_numbers = len(hidden_ND) * self._vocab_size
        if self._buffer is None or num_numbers > len(self._buffer):
            self._buffer = hidden_ND.new_empty(num_numbers)
        logits_VN = self._buffer[:num_numbers].view(self._vocab_size, len(hidden_ND))
        return torch.mm(self._head_VD, hidden_ND.T, out=logits_VN).T

    def backward(self, slope_NV: Tensor, hidden_ND: Tensor, weights_N: Tensor) -> Tensor:
        """Add slope.T @ (weights * states) to the head's gradient; return weights * (slope @ head)."""
        if self.gradient_VD is None:
            self.gradient_VD = hidden_ND.new_zeros(self._num_rows, hidden_ND.shape[1])
        gradient_VD, weighted_ND = self.gradient_VD[: self._vocab_size], hidden_ND * weights_N[:, None]
        if self._mixed:
            slope_NV, dtype = slope_NV.to(self._head_VD.dtype), self._head_VD.dtype
            gradient_VD += torch.mm(slope_NV.T, weighted_ND.to(dtype), out_dtype=self._dtype)
            return torch.mm(slope_NV, self._head_VD, out_dtype=self._dtype) * weights_N[:, None]
        gradient_VD.addmm_(slope_NV.T, weighted_ND)
        return (slope_NV @ self._head_VD) * weights_N[:, None]


class GatheredHead:
    """Only the K rows that each token names: K D multiply-adds per token each way, and as few gradient rows."""

    def __init__(self, head_VD: Tensor, *, ids_NK: Tensor, dtype: torch.dtype, chunk_tokens: int) -> None:
        num_numbers = max(1, ids_NK.shape[1] * head_VD.shape[1])
        self.chunk_tokens = max(1, min(chunk_tokens, _MAX_GATHERED_NUMBERS // num_numbers))
        self._head_VD = head_VD.detach()
        self._ids_NK = ids_NK
        self._dtype = dtype
        self._chunk_ids = ids_NK
        self._chunk_NKD = head_VD
        self.gradient_VD: Tensor | None = None

    def logits(self, rows: slice, hidden_ND: Tensor) -> Tensor:
        """Return z[n,k] = states[n] . head[ids[n,k]]."""
        self._chunk_ids = self._ids_NK[rows]
        self._chunk_NKD = self._head_VD[self._chunk_ids].to(self._dtype)
        return torch.bmm(self._chunk_NKD, hidden_ND[:, :, None]).squeeze(-1)

    def backward(self, slope_NV: Tensor, hidden_ND: Tensor, weights_N: Tensor) -> Tensor:
        """Add to the named rows of the head's gradient; return weights * sum_k slope[n,k] head[ids[n,k]]."""
        if self.gradient_VD is None:
            self.gradient_VD = torch.zeros_like(self._head_VD, dtype=self._dtype)
        slope_NK = slope_NV * weights_N[:, None]
        gradient_ND = torch.bmm(slope_NK[:, None, :], self._chunk_NKD).squeeze(1)
        torch.mul(slope_NK[:, :, None], hidden_ND[:, None, :], out=self._chunk_NKD)
        self.gradient_VD.index_add_(0, self._chunk_ids.flatten(), self._chunk_NKD.flatten(0, 1))
        return gradient_ND


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLosses:
    """The results of all chunks."""

    loss: Tensor  # [] differentiable once
    loss_N: Tensor
    divergence_N: Tensor
    logprobs_N: Tensor  # [N], or [0] where the row loss gives none
    stats: dict[str, Tensor]

    def with_diagnostics(self, diagnostics: dict[str, Tensor]) -> Losses:
        """Return the objective's result."""
        return Losses(
            loss=self.loss,
            loss_N=self.loss_N,
            divergence_N=self.divergence_N,
            sampled_logprobs_N=self.logprobs_N,
            stats=self.stats,
            diagnostics=diagnostics,
        )


def head_losses(
    hidden_ND: Tensor, head_VD: Tensor, *, head: Head, row_loss: RowLoss, tokens: Tokens, temperature: float
) -> HeadLosses:
    """Run a row loss over all tokens, last chunk first, and return sum_n weights_N[n] * loss_N[n] with its gradients.

    Masked tokens are not read, so they may hold anything, NaN included: their states count as 0, their results are 0.
    The order lets a row loss carry discounted returns from a chunk to the one before it.
    """
    wanted = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad)
    dtype = widest_dtype(hidden_ND, head_VD)
    weights_N = tokens.weights_N.to(dtype).masked_fill(~tokens.mask_N, 0)
    gradient_ND = torch.zeros_like(hidden_ND, dtype=dtype) if wanted else None
    parts: list[RowLosses] = []
    with torch.no_grad(), _no_autocast(hidden_ND):
        for rows in reversed(list(chunks(len(hidden_ND), chunk_tokens=head.chunk_tokens))):
            masked_N = ~tokens.mask_N[rows]
            states_ND = hidden_ND[rows].to(dtype).masked_fill(masked_N[:, None], 0) / temperature
            part = row_loss(rows, head.logits(rows, states_ND), wanted)
            parts.insert(0, without_masked(part, masked_N))
            if gradient_ND is not None and part.slope_NV is not None:
                gradient_ND[rows] = head.backward(part.slope_NV, states_ND, weights_N[rows]) / temperature
        loss_N = torch.cat([part.loss_N for part in parts])
        loss = (weights_N * loss_N).sum()
    if gradient_ND is not None:
        loss = _GivenGradients.apply(loss, hidden_ND, head_VD, gradient_ND, head.gradient_VD)
    logprobs = [part.logprobs_N for part in parts if part.logprobs_N is not None]
    return HeadLosses(
        loss=loss,
        loss_N=loss_N,
        divergence_N=torch.cat([part.divergence_N for part in parts]),
        logprobs_N=torch.cat(logprobs) if logprobs else loss_N.new_empty(0),
        stats={name: torch.cat([part.stats[name] for part in parts]) for name in parts[0].stats},
    )


def teacher_rows(
    signal: HiddenSignal, *, tokens: Tokens, vocab_size: int, options: ObjectiveOptions, dtype: torch.dtype
) -> Callable[[slice], Tensor]:
    """Return a function from a chunk's rows to the teacher's logits [N,V] there; the next call overwrites them."""
    head = WholeHead(signal.head_VD, vocab_size=vocab_size, dtype=dtype, chunk_tokens=options.chunk_tokens)

    def logits(rows: slice) -> Tensor:
        masked_N1 = ~tokens.mask_N[rows][:, None]
        return head.logits(rows, signal.hidden_ND[rows].to(dtype).masked_fill(masked_N1, 0) / options.temperature)

    return logits


class _GivenGradients(torch.autograd.Function):  # type: ignore[misc]  # mypy does not follow torch
    """A scalar whose gradients are known already; the backward pass scales them by the scalar's own, in place."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        loss, hidden_ND, head_VD, gradient_ND, gradient_VD = tensors
        assert loss is not None
        assert hidden_ND is not None
        assert head_VD is not None
        ctx.gradients = (gradient_ND, gradient_VD)
        ctx.dtypes = (hidden_ND.dtype, head_VD.dtype)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated before; its gradients are formed once, with the loss")
        given, ctx.gradients = ctx.gradients, None
        gradients = [
            gradient.mul_(scale.to(gradient.dtype)).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(given, ctx.dtypes, strict=True)
        ]
        return None, *gradients, None, None


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = torch.autocast(device_type=tensor.device.type, enabled=False)
    return context
