"""Products of states with an output matrix: with all its rows, or with the rows that each token names.

Suffixes: N tokens, R rows of the matrix, W columns of logits (R in whole groups), K ids per token, D hidden size.
"""

import torch
from torch import Tensor

from opd_ray.objectives.rows import chunks
from workers.teacher.wide_rows import padded_size

_CHUNK_TOKENS = {"cpu": 256, "cuda": 512}
_BLOCK_ROWS = 8192  # of the matrix, multiplied at once by a CPU: their logits of a chunk stay in its cache
_GATHERED_NUMBERS = 2**24  # of matrix rows that a GPU holds at once


class OutputMatrix:
    """The matrix in float32, or on a GPU as it is; logits are float32, at a temperature."""

    def __init__(self, head_RD: Tensor, *, temperature: float) -> None:
        padding = (0, 0, 0, padded_size(len(head_RD)) - len(head_RD))
        self._head_WD = torch.nn.functional.pad(head_RD if head_RD.is_cuda else head_RD.float(), padding)
        self._temperature = temperature
        self.chunk_tokens = _CHUNK_TOKENS[head_RD.device.type]
        # A CPU writes all chunks into one buffer: fresh memory costs as much as the arithmetic on it.
        num_rows = 0 if head_RD.is_cuda else self.chunk_tokens
        self._logits_NW = torch.empty(num_rows, len(self._head_WD))

    @property
    def weights_WD(self) -> Tensor:
        """Return the matrix, padded with rows of zeros."""
        return self._head_WD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return logits [N,W] of at most chunk_tokens tokens; the next call overwrites them."""
        if self._head_WD.is_cuda:  # tensor cores multiply 16-bit numbers and add in float32
            states_ND = hidden_ND.to(self._head_WD.dtype)
            return torch.mm(states_ND, self._head_WD.T, out_dtype=torch.float32).div_(self._temperature)
        states_ND, logits_NW = hidden_ND.float() / self._temperature, self._logits_NW[: len(hidden_ND)]
        for rows in chunks(len(self._head_WD), chunk_tokens=_BLOCK_ROWS):
            # oneDNN. MKL, which torch.mm calls, takes a sixth longer on processors that are not of its maker.
            logits_NW[:, rows] = torch.ops.mkldnn._linear_pointwise(
                states_ND, self._head_WD[rows], None, "none", [], ""
            )
        return logits_NW

    def logits_at(self, hidden_ND: Tensor, ids_NK: Tensor) -> Tensor:
        """Return logits [N,K] of the given ids, any number of tokens; no other row of the matrix is read."""
        states_ND = hidden_ND.float() / self._temperature
        if self._head_WD.is_cuda:
            return self._gathered(states_ND, ids_NK)
        # Sampled at the given places, the product needs no copy of the rows.
        num_tokens, num_ids = ids_NK.shape
        places = torch.sparse_csr_tensor(
            torch.arange(num_tokens + 1) * num_ids,
            ids_NK.flatten(),
            torch.zeros(ids_NK.numel()),
            size=(num_tokens, len(self._head_WD)),
            check_invariants=False,  # ids are in any order
        )
        return torch.sparse.sampled_addmm(places, states_ND, self._head_WD.T, beta=0.0).values().view(ids_NK.shape)

    def _gathered(self, states_ND: Tensor, ids_NK: Tensor) -> Tensor:
        num_ids, size = ids_NK.shape[1], self._head_WD.shape[1]
        logits = [states_ND.new_empty(0, num_ids)]
        for rows in chunks(len(ids_NK), chunk_tokens=max(1, _GATHERED_NUMBERS // max(1, num_ids * size))):
            head_NKD = self._head_WD.index_select(0, ids_NK[rows].flatten()).view(*ids_NK[rows].shape, size)
            logits.append(torch.bmm(head_NKD.float(), states_ND[rows, :, None]).squeeze(-1))
        return torch.cat(logits)
