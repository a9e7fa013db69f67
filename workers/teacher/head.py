"""Turns a teacher's final hidden states into what was asked for, a chunk of tokens at a time.

Suffixes: N tokens, R rows of the teacher's head, of which the first V are the common vocabulary, W columns of logits
(R and padding), K ids of a support, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.objectives.equivalence import Equivalence
from opd_ray.objectives.rows import chunks
from opd_ray.protocol import Payload, ScoreRequest
from workers.teacher.products import OutputMatrix
from workers.teacher.wide_rows import log_softmax, top_k

_NO_ID = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadScores:
    """What a head says of N tokens."""

    ids_NK: Tensor  # int32, distinct in a row; -1: no id
    logprobs_NK: Tensor  # float32; any value where there is no id
    sampled_logprobs_N: Tensor  # float32; [0] when not asked for
    dropped_mass_N: Tensor  # float32, probability of the ids that only the teacher has; NaN: not computed


class TeacherHead:
    """The output matrix, and what its logits mean. Serves one call at a time: they share the memory of their logits."""

    def __init__(self, head_RD: Tensor, *, vocab_size: int, temperature: float, equivalence: Equivalence) -> None:
        """Take all rows of a checkpoint's head; the softmax is over the first vocab_size, those the student has too.

        equivalence: ids that count as one. Raises ValueError for fewer rows.
        """
        if len(head_RD) < vocab_size:
            raise ValueError(f"the teacher's head has {len(head_RD)} rows, expected at least {vocab_size}")
        self._matrix = OutputMatrix(head_RD, temperature=temperature)
        self._num_rows, self._vocab_size = len(head_RD), vocab_size
        self._equivalence = equivalence

    @property
    def weights_WD(self) -> Tensor:
        """Return the output matrix."""
        return self._matrix.weights_WD

    @torch.inference_mode()
    def score(self, hidden_ND: Tensor, *, ids_N: Tensor, student_ids_NK: Tensor, request: ScoreRequest) -> HeadScores:
        """Return what a request asks for, of the tokens ids_N that these states predict; ids int64.

        The K columns of a support are the teacher's top_k, then the student's, then the sampled token, as far as asked
        for; an id that a column further left has, that is not in the top_p mass or not in the common vocabulary, is -1.
        Where nothing needs the whole head, only the rows of the given ids are read and the log-probs are logits.
        """
        ids_N1 = self._equivalence.canonical(ids_N)[:, None]
        given_NK = self._given(ids_N1, student_ids_NK, request)
        support = request.payload is Payload.support
        num_top = request.top_k if support and request.support != "student" else 0
        sampled = request.sampled_logprobs or request.payload is Payload.sampled
        if not (num_top or sampled or (support and (request.normalised or self._equivalence.classes))):
            return self._logits_alone(hidden_ND, _without_repeats(given_NK))
        ids, logprobs, sampled_logprobs, dropped_masses = [], [], [], []
        for rows in chunks(len(hidden_ND), chunk_tokens=self._matrix.chunk_tokens):
            logprobs_NW, dropped_mass_N = self._logprobs(hidden_ND[rows], ids_N1[rows])
            top_ids_NK = _within_mass(*top_k(logprobs_NW, k=num_top), top_p=request.top_p)
            ids_NK = _without_repeats(torch.cat([top_ids_NK, given_NK[rows]], dim=1))
            ids.append(ids_NK.to(torch.int32))
            logprobs.append(logprobs_NW.gather(1, ids_NK.clamp(min=0)))
            sampled_logprobs.append(logprobs_NW.gather(1, ids_N1[rows]).squeeze(1))
            dropped_masses.append(dropped_mass_N)
        return HeadScores(
            ids_NK=torch.cat(ids),
            logprobs_NK=torch.cat(logprobs),
            sampled_logprobs_N=torch.cat(sampled_logprobs) if sampled else dropped_mass_N.new_empty(0),
            dropped_mass_N=torch.cat(dropped_masses),
        )

    def _given(self, ids_N1: Tensor, student_ids_NK: Tensor, request: ScoreRequest) -> Tensor:
        """Return the columns of a support that do not depend on the teacher; none of another payload."""
        student_ids_NK = student_ids_NK.masked_fill(student_ids_NK >= self._vocab_size, _NO_ID)
        support = request.payload is Payload.support
        from_student = support and request.support != "teacher"
        return torch.cat(
            [
                self._equivalence.canonical(student_ids_NK) if from_student else student_ids_NK[:, :0],
                ids_N1 if support and request.include_sampled else ids_N1[:, :0],
            ],
            dim=1,
        )

    def _logprobs(self, hidden_ND: Tensor, ids_N1: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probs [N,W], classes merged, -inf from V on, and the mass of the dropped ids [N].

        ids_N1: any canonical ids, one a row. The next call overwrites the log-probs.
        """
        logits_NW = self._matrix.logits(hidden_ND)
        dropped_N1 = logits_NW[:, self._vocab_size : self._num_rows].logsumexp(-1, keepdim=True)  # of nothing: -inf
        logits_NW[:, self._vocab_size :] = -torch.inf
        some_N1 = self._equivalence.merge(logits_NW).gather(1, ids_N1)
        logprobs_NW = log_softmax(logits_NW)
        normaliser_N1 = some_N1 - logprobs_NW.gather(1, ids_N1)
        return logprobs_NW, (dropped_N1 - normaliser_N1).sigmoid().squeeze(1)

    def _logits_alone(self, hidden_ND: Tensor, ids_NK: Tensor) -> HeadScores:
        unknown = torch.nan if self._num_rows > self._vocab_size else 0.0
        logits_NK = self._matrix.logits_at(hidden_ND, ids_NK.clamp(min=0))
        return HeadScores(
            ids_NK=ids_NK.to(torch.int32),
            logprobs_NK=logits_NK,
            sampled_logprobs_N=logits_NK.new_empty(0),
            dropped_mass_N=logits_NK.new_full((len(ids_NK),), unknown),
        )


def _within_mass(ids_NK: Tensor, logprobs_NK: Tensor, *, top_p: float) -> Tensor:
    """Return descending ids with -1 where those before hold the mass already."""
    if top_p >= 1:
        return ids_NK
    p_NK = logprobs_NK.exp()
    return ids_NK.masked_fill(p_NK.cumsum(-1) - p_NK >= top_p, _NO_ID)


def _without_repeats(ids_NK: Tensor) -> Tensor:
    """Return the ids with -1 wherever a column further left has the same."""
    sorted_NK, order_NK = ids_NK.sort(dim=-1, stable=True)
    repeats_NK = torch.zeros_like(sorted_NK, dtype=torch.bool)
    repeats_NK[:, 1:] = sorted_NK[:, 1:] == sorted_NK[:, :-1]
    return ids_NK.masked_fill(torch.zeros_like(repeats_NK).scatter_(1, order_NK, repeats_NK), _NO_ID)
