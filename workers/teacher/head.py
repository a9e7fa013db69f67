"""Turns a teacher's final hidden states into what was asked for, a chunk of tokens at a time.

Suffixes: N tokens, R rows of the teacher's head, of which the first V are the common vocabulary, W columns of logits
(R in whole groups), K ids of a support, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.objectives.equivalence import Equivalence
from opd_ray.objectives.rows import chunks
from opd_ray.protocol import Payload, ScoreRequest
from workers.teacher.wide_rows import padded_size, read_rows, top_k

_CHUNK_TOKENS = {"cpu": 256, "cuda": 512}
_GATHERED_NUMBERS = {"cpu": 2**18, "cuda": 2**24}  # of head rows held at once; on a CPU they stay in its cache
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
        """Take all rows of a checkpoint's head; in float32, but on a GPU a 16-bit head stays as it is.

        vocab_size (V): the ids that the student has too; the softmax is over these. equivalence: ids that count as one.
        Raises ValueError for fewer rows.
        """
        self._num_rows, self._vocab_size = len(head_RD), vocab_size
        if self._num_rows < vocab_size:
            raise ValueError(f"the teacher's head has {self._num_rows} rows, expected at least {vocab_size}")
        padding = (0, 0, 0, padded_size(self._num_rows) - self._num_rows)
        self._head_WD = torch.nn.functional.pad(head_RD if head_RD.is_cuda else head_RD.float(), padding)
        self._temperature = temperature
        self._equivalence = equivalence
        device = head_RD.device.type
        self._chunk_tokens, self._gathered_numbers = _CHUNK_TOKENS[device], _GATHERED_NUMBERS[device]
        # One buffer for all chunks: fresh memory costs as much as the arithmetic on it.
        num_buffered = self._chunk_tokens if self._head_WD.dtype is torch.float32 else 0
        self._logits_NW = torch.empty(num_buffered, len(self._head_WD), device=head_RD.device)

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
        ids, logprobs, sampled_logprobs, dropped = [], [], [], []
        for rows in chunks(len(hidden_ND), chunk_tokens=self._chunk_tokens):
            logits_NW, lse_dropped_N1 = self._logits(hidden_ND[rows])
            lse_N1, maxima_NB = read_rows(logits_NW)
            top_ids_NK, top_logits_NK = top_k(logits_NW, maxima_NB, k=num_top)
            top_ids_NK = _within_mass(top_ids_NK, top_logits_NK - lse_N1, top_p=request.top_p)
            ids_NK = _without_repeats(torch.cat([top_ids_NK, given_NK[rows]], dim=1))
            ids.append(ids_NK.to(torch.int32))
            logprobs.append(logits_NW.gather(1, ids_NK.clamp(min=0)) - lse_N1)
            sampled_logprobs.append(logits_NW.gather(1, ids_N1[rows]) - lse_N1)
            dropped.append((lse_dropped_N1 - lse_N1).sigmoid())
        return HeadScores(
            ids_NK=torch.cat(ids),
            logprobs_NK=torch.cat(logprobs),
            sampled_logprobs_N=torch.cat(sampled_logprobs).squeeze(1) if sampled else lse_N1.new_empty(0),
            dropped_mass_N=torch.cat(dropped).squeeze(1),
        )

    def _given(self, ids_N1: Tensor, student_ids_NK: Tensor, request: ScoreRequest) -> Tensor:
        """Return the columns of a support that do not depend on the teacher; none of another payload."""
        student_ids_NK = student_ids_NK.masked_fill(student_ids_NK >= self._vocab_size, _NO_ID)
        of_support = request.payload is Payload.support
        from_student = of_support and request.support != "teacher"
        return torch.cat(
            [
                self._equivalence.canonical(student_ids_NK) if from_student else student_ids_NK[:, :0],
                ids_N1 if of_support and request.include_sampled else ids_N1[:, :0],
            ],
            dim=1,
        )

    def _logits(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [N,W], classes merged, -inf from V on, and log sum exp of the dropped logits [N,1].

        The next call overwrites them.
        """
        if self._head_WD.dtype is torch.float32:
            states_ND, logits_NW = hidden_ND.float() / self._temperature, self._logits_NW[: len(hidden_ND)]
            torch.mm(states_ND, self._head_WD.T, out=logits_NW)
        else:  # tensor cores multiply 16-bit numbers and add in float32
            states_ND = hidden_ND.to(self._head_WD.dtype)
            logits_NW = torch.mm(states_ND, self._head_WD.T, out_dtype=torch.float32).div_(self._temperature)
        dropped_N1 = logits_NW[:, self._vocab_size : self._num_rows].logsumexp(-1, keepdim=True)
        logits_NW[:, self._vocab_size :] = -torch.inf
        return self._equivalence.merge(logits_NW), dropped_N1

    def _logits_alone(self, hidden_ND: Tensor, ids_NK: Tensor) -> HeadScores:
        """Return the logits at the given ids, from their rows of the head."""
        numbers_per_token = max(1, ids_NK.shape[1] * self._head_WD.shape[1])
        logits = [
            torch.bmm(self._head_WD[ids_NK[rows].clamp(min=0)].float(), hidden_ND[rows].float()[:, :, None]).squeeze(-1)
            for rows in chunks(len(hidden_ND), chunk_tokens=max(1, self._gathered_numbers // numbers_per_token))
        ]
        unknown = torch.nan if self._num_rows > self._vocab_size else 0.0
        return HeadScores(
            ids_NK=ids_NK.to(torch.int32),
            logprobs_NK=torch.cat(logits) / self._temperature,
            sampled_logprobs_N=self._logits_NW.new_empty(0),
            dropped_mass_N=self._logits_NW.new_full((len(hidden_ND),), unknown),
        )


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
