"""Turns a teacher's final hidden states into what was asked for, a chunk of tokens at a time.

Suffixes: N tokens, V vocabulary, K ids of a support, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.objectives.equivalence import Equivalence
from opd_ray.protocol import ScoreRequest

_CHUNK_TOKENS = 512
_NO_ID = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHead:
    """The output matrix, and what its logits mean."""

    head_VD: Tensor  # cut to the common vocabulary
    temperature: float
    equivalence: Equivalence  # ids that count as one outcome

    @torch.inference_mode()
    def sampled(self, hidden_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Return the full-vocabulary log-prob float32 [N] of the given tokens."""
        parts = [
            _at(logits_NV, ids_N1) - logits_NV.logsumexp(-1, keepdim=True)
            for logits_NV, ids_N1 in self._chunks(hidden_ND, self.equivalence.canonical(ids_N)[:, None])
        ]
        return torch.cat(parts).squeeze(1)

    @torch.inference_mode()
    def support(
        self, hidden_ND: Tensor, *, ids_N: Tensor, student_ids_NK: Tensor, request: ScoreRequest
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids int32 [N,K], log-probs float32 [N,K] and, if asked for, the sampled tokens' [N] or else [0].

        The K columns are the teacher's top_k, then the student's, then the sampled token, as far as asked for; an id
        that a column further left has, or that is not in the top_p mass, is -1. Where nothing needs the whole head,
        only the rows of the given ids are read and the log-probs are logits.
        """
        ids_N, student_ids_NK = self.equivalence.canonical(ids_N), self.equivalence.canonical(student_ids_NK)
        # The student may have more rows than the common vocabulary; the teacher knows nothing of them.
        student_ids_NK = student_ids_NK.masked_fill(student_ids_NK >= len(self.head_VD), _NO_ID)
        given_NK = student_ids_NK if request.support != "teacher" else student_ids_NK[:, :0]
        if request.include_sampled:
            given_NK = torch.cat([given_NK, ids_N[:, None]], dim=1)
        from_student = request.support == "student" and not (request.normalised or request.sampled_logprobs)
        if from_student and not self.equivalence.classes:
            ids_NK = _without_repeats(given_NK)
            return ids_NK.to(torch.int32), self._gathered(hidden_ND, ids_NK), hidden_ND.new_empty(0).float()
        num_top = 0 if request.support == "student" else request.top_k
        columns = torch.cat([given_NK, ids_N[:, None]], dim=1)
        ids, logprobs, sampled = [], [], []
        for logits_NV, columns_NK in self._chunks(hidden_ND, columns):
            lse_N1 = logits_NV.logsumexp(-1, keepdim=True)
            top = logits_NV.topk(num_top, dim=-1)
            top_ids_NK = _within_mass(top.indices, top.values - lse_N1, top_p=request.top_p)
            ids_NK = _without_repeats(torch.cat([top_ids_NK, columns_NK[:, :-1]], dim=1))
            ids.append(ids_NK.to(torch.int32))
            logprobs.append(_at(logits_NV, ids_NK.clamp(min=0)) - lse_N1)
            sampled.append(_at(logits_NV, columns_NK[:, -1:]) - lse_N1)
        sampled_N = torch.cat(sampled).squeeze(1) if request.sampled_logprobs else hidden_ND.new_empty(0).float()
        return torch.cat(ids), torch.cat(logprobs), sampled_N

    def _gathered(self, hidden_ND: Tensor, ids_NK: Tensor) -> Tensor:
        """Return the logits at the given ids, from their rows of the head alone."""
        parts = [
            torch.bmm(self.head_VD[ids_nK.clamp(min=0)].float(), chunk_nD.float()[:, :, None]).squeeze(-1)
            for chunk_nD, ids_nK in zip(hidden_ND.split(_CHUNK_TOKENS), ids_NK.split(_CHUNK_TOKENS), strict=True)
        ]
        return torch.cat(parts) / self.temperature

    def _chunks(self, hidden_ND: Tensor, columns_NK: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [N,V] of a chunk of tokens, classes merged, and the chunk's rows of the given ids."""
        head_DV = self.head_VD.float().T
        for chunk_nD, columns_nK in zip(hidden_ND.split(_CHUNK_TOKENS), columns_NK.split(_CHUNK_TOKENS), strict=True):
            yield self.equivalence.merge((chunk_nD.float() @ head_DV).div_(self.temperature)), columns_nK


def _at(values_NV: Tensor, ids_NK: Tensor) -> Tensor:
    return values_NV.gather(1, ids_NK)


def _within_mass(ids_NK: Tensor, logprobs_NK: Tensor, *, top_p: float) -> Tensor:
    """Return descending ids with -1 where those before hold the mass already."""
    if top_p >= 1:
        return ids_NK
    p_NK = logprobs_NK.exp()
    return ids_NK.masked_fill(p_NK.cumsum(-1) - p_NK >= top_p, _NO_ID)


def _without_repeats(ids_NK: Tensor) -> Tensor:
    """Return the ids with -1 wherever a column further left has the same."""
    repeats_NKK = (ids_NK[:, :, None] == ids_NK[:, None, :]).tril(diagonal=-1)
    return ids_NK.masked_fill(repeats_NKK.any(-1), _NO_ID)
