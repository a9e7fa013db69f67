"""The support objective: a divergence on a small set S of ids per token, with a choice about the tail outside S.

Suffixes: N tokens (of a chunk, in row losses), K support, V vocabulary, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.objectives.diagnostics import diagnose
from opd_ray.objectives.divergences import ABSENT, Divergence
from opd_ray.objectives.equivalence import Equivalence, gathering, merging
from opd_ray.objectives.head import GatheredHead, WholeHead, head_losses
from opd_ray.objectives.objective import Losses, ObjectiveOptions, Tail
from opd_ray.objectives.rows import RowLosses, common_vocabulary, exponentiate_, scale_, widest_dtype
from opd_ray.objectives.signals import SupportSignal, Tokens, check_num_tokens

_SAMPLED_TAILS = ("sampled_corrected", "sampled_uncorrected")


def losses(
    hidden_ND: Tensor, head_VD: Tensor, *, tokens: Tokens, signal: SupportSignal, options: ObjectiveOptions
) -> Losses:
    """Return loss_t = D on S, D the options' divergence with terms phi(p_v, q_v); `tail` says how S is completed.

    - `renormalise`: D(p^, q^), both models renormalised in S ("local support matching"). Says nothing about the mass
      outside S. Reads only the K head rows of S, so it costs N K D and not N V D, and a row's gradient is 0 outside S.
    - `bucket`: all ids outside S are one more outcome, of mass 1 - sum_S. At most the full divergence, equal at K = V.
    - `sampled_corrected`: sum_S phi, plus phi(y) / p(y) times rho = p(y) / sg p(y) where the sampled y is outside S:
      unbiased for the full divergence in value and gradient.
    - `sampled_uncorrected`: the same with the log-ratio held constant. A baseline: the value is unbiased, but for the
      reverse KL the gradient is that of KL + P_S.
    - `none`: sum_S phi with p normalised over the vocabulary. A baseline: no divergence; for the reverse KL it can be
      negative and rewards moving mass out of S.

    divergence_N is the loss itself. sampled_logprobs_N is empty for `renormalise`. Stats: `signal`, for sampled tails
    |log p(y) - log q(y)| and for the others its expectation over the ids of S, sum_S p |log p - log q| (p^, q^
    renormalised); `support_teacher_mass`, sum_S q, except for `renormalise`, whose log q may lack a constant.
    hidden_ND [N,D], head_VD [V,D]; nats. Source: arXiv 2603.25562. Choose `renormalise` by default: nearly the signal
    of `full` for a payload and a cost that do not grow with the vocabulary. Raises ValueError for too few ids: K < 2
    renormalised, K < 1 otherwise.
    """
    check_num_tokens(tokens, hidden_ND=hidden_ND, signal_N=signal.ids_NK)
    tokens = tokens.cleared()
    dtype = widest_dtype(hidden_ND, head_VD)
    vocab_size = common_vocabulary(options.vocab_size, head_VD)
    _require_ids(signal.ids_NK.shape[1], tail=options.tail)
    equivalence = Equivalence.of(options.equivalent_ids, device=hidden_ND.device, vocab_size=vocab_size)
    ids_NK = equivalence.without_duplicates(signal.ids_NK)
    present_NK = (ids_NK >= 0) & (ids_NK < vocab_size) & tokens.mask_N[:, None]
    support = _Support(
        ids_NK=ids_NK.masked_fill(~present_NK, 0),
        present_NK=present_NK,
        log_q_NK=signal.logprobs_NK.detach().to(dtype).masked_fill(~present_NK, ABSENT),
        divergence=options.divergence,
    )
    if options.tail == "renormalise":
        ids, row_loss = gathering(_Renormalised(support=support), equivalence, ids_NK=support.ids_NK)
        head: GatheredHead | WholeHead = GatheredHead(
            head_VD, ids_NK=ids, dtype=dtype, chunk_tokens=options.chunk_tokens
        )
    else:
        sampled = _sampled_logprobs(signal, tokens=tokens, tail=options.tail, dtype=dtype)
        rows = _WithTail(support=support, ids_N=equivalence.canonical(tokens.ids_N), log_q_N=sampled, tail=options.tail)
        row_loss = merging(rows, equivalence, ids_N=tokens.ids_N)
        head = WholeHead(head_VD, vocab_size=vocab_size, dtype=dtype, chunk_tokens=options.chunk_tokens)
    result = head_losses(
        hidden_ND, head_VD, head=head, row_loss=row_loss, tokens=tokens, temperature=options.temperature
    )
    return result.with_diagnostics(diagnose(hidden_ND, head_VD, tokens=tokens, options=options, support_ids_NK=ids_NK))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Support:
    ids_NK: Tensor  # 0 where absent
    present_NK: Tensor
    log_q_NK: Tensor  # ABSENT where absent
    divergence: Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class _Renormalised:
    """The row loss on the logits [N,K] of S alone."""

    support: _Support

    def __call__(self, rows: slice, logits_NK: Tensor, wanted: bool) -> RowLosses:
        support = self.support
        present_NK = support.present_NK[rows]
        log_p_NK = logits_NK.masked_fill(~present_NK, ABSENT).log_softmax(-1)
        log_q_NK = support.log_q_NK[rows].log_softmax(-1)
        signal_N = _expected_log_ratio(log_p_NK, log_q_NK)
        loss_N, slope_NK = support.divergence(log_p_NK, log_q_NK)
        slope_NK = slope_NK.masked_fill(~present_NK, 0) if wanted else None
        return RowLosses(loss_N=loss_N, slope_NV=slope_NK, divergence_N=loss_N, stats={"signal": signal_N})


@dataclass(frozen=True, slots=True, kw_only=True)
class _WithTail:
    """The row loss on the logits of the whole vocabulary, with the ids outside S as one bucket or not at all."""

    support: _Support
    ids_N: Tensor  # sampled, canonical
    log_q_N: Tensor  # of the sampled ids; read by sampled tails only
    tail: Tail

    def __call__(self, rows: slice, logits_NV: Tensor, wanted: bool) -> RowLosses:
        present_NK = self.support.present_NK[rows]
        log_q_NK = self.support.log_q_NK[rows]
        ids_NK = self._ids_that_exist(rows)
        ids_N1 = self.ids_N[rows][:, None]
        sampled_N = logits_NV.gather(1, ids_N1).squeeze(1)
        named_NK = logits_NV.gather(1, ids_NK)
        chosen_NK = named_NK.masked_fill(~present_NK, ABSENT)
        # A row without any id of S is all tail: it puts back what it reads.
        logits_NV.scatter_(1, ids_NK, named_NK.masked_fill(present_NK.any(-1, keepdim=True), ABSENT))
        largest_N, total_N = exponentiate_(logits_NV)  # of the tail
        lse_tail_N = largest_N + total_N.log()
        lse_N = torch.logaddexp(chosen_NK.logsumexp(-1), lse_tail_N)
        log_p_NK, logprobs_N = chosen_NK - lse_N[:, None], sampled_N - lse_N
        if self.tail == "bucket":
            loss_N, slope_NK, tail_slope_N = self._bucket(log_p_NK, log_q_NK, log_p_tail_N=lse_tail_N - lse_N)
            tail_scale_N = tail_slope_N / total_N
        else:
            outside_N = ~((ids_NK == ids_N1) & present_NK).any(-1)
            loss_N, slope_NK, sampled_slope_N = self._seen(log_p_NK, log_q_NK, rows, logprobs_N, outside_N)
            share_N = -(slope_NK.sum(-1) + sampled_slope_N)
            slope_NK = slope_NK + log_p_NK.exp() * share_N[:, None]
            tail_scale_N = share_N * (largest_N - lse_N).exp()
        if wanted:
            scale_(logits_NV, tail_scale_N)  # ids of S are absent here: 0
            logits_NV.scatter_add_(1, ids_NK, slope_NK.masked_fill(~present_NK, 0))
            if self.tail != "bucket":
                logits_NV.scatter_add_(1, ids_N1, sampled_slope_N[:, None])
        return RowLosses(
            loss_N=loss_N,
            slope_NV=logits_NV if wanted else None,
            divergence_N=loss_N,
            logprobs_N=logprobs_N,
            stats={"signal": self._signal(rows, log_p_NK, logprobs_N), "support_teacher_mass": log_q_NK.exp().sum(-1)},
        )

    def _signal(self, rows: slice, log_p_NK: Tensor, logprobs_N: Tensor) -> Tensor:
        if self.tail in _SAMPLED_TAILS:
            return (logprobs_N - self.log_q_N[rows]).abs()
        return _expected_log_ratio(log_p_NK, self.support.log_q_NK[rows])

    def _ids_that_exist(self, rows: slice) -> Tensor:
        """Return the ids of S with absent columns naming the row's first present id once more."""
        ids_NK, present_NK = self.support.ids_NK[rows], self.support.present_NK[rows]
        first_N1 = ids_NK.gather(1, present_NK.to(torch.int8).argmax(-1, keepdim=True))
        return torch.where(present_NK, ids_NK, first_N1)

    def _bucket(self, log_p_NK: Tensor, log_q_NK: Tensor, *, log_p_tail_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the divergence over S and its tail, and the slopes with respect to z_S and log sum_tail exp(z)."""
        # The teacher's tail is a difference from 1, so it is known to the rounding of 1 only.
        q_tail_N = (1 - log_q_NK.exp().sum(-1)).clamp(min=torch.finfo(log_q_NK.dtype).eps)
        empty_N = log_p_tail_N < ABSENT / 2  # S is the whole vocabulary
        log_q_tail_N = q_tail_N.log().masked_fill(empty_N, ABSENT)
        loss_N, slope_NK = self.support.divergence(
            torch.cat([log_p_NK, log_p_tail_N[:, None]], dim=-1), torch.cat([log_q_NK, log_q_tail_N[:, None]], dim=-1)
        )
        return loss_N, slope_NK[:, :-1], slope_NK[:, -1].masked_fill(empty_N, 0)

    def _seen(
        self, log_p_NK: Tensor, log_q_NK: Tensor, rows: slice, logprobs_N: Tensor, outside_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return sum_S phi with the sampled tail, and the derivatives with respect to log p_S and log p(y)."""
        divergence = self.support.divergence
        phi_NK, slope_NK = divergence.terms(log_p_NK, log_q_NK)
        slope_NK = slope_NK + divergence.constant * log_p_NK.exp()
        if self.tail == "none":
            return phi_NK.sum(-1), slope_NK, torch.zeros_like(logprobs_N)
        phi_N, slope_N = divergence.terms(logprobs_N, self.log_q_N[rows])
        p_N = logprobs_N.exp().clamp(min=torch.finfo(logprobs_N.dtype).tiny)
        value_N = (phi_N / p_N).masked_fill(~outside_N, 0)
        corrected_N = (slope_N / p_N + divergence.constant).masked_fill(~outside_N, 0)
        return phi_NK.sum(-1) + value_N, slope_NK, corrected_N if self.tail == "sampled_corrected" else value_N


def _expected_log_ratio(log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    """Return sum_S p |log p - log q|; ids absent on both sides add nothing."""
    return (log_p_NK.exp() * (log_p_NK - log_q_NK).abs()).sum(-1)


def _sampled_logprobs(signal: SupportSignal, *, tokens: Tokens, tail: Tail, dtype: torch.dtype) -> Tensor:
    if tail not in _SAMPLED_TAILS:
        return signal.sampled_logprobs_N
    if len(signal.sampled_logprobs_N) != len(tokens.ids_N):
        given = f"{len(signal.sampled_logprobs_N)} sampled log-probs for {len(tokens.ids_N)} tokens"
        raise ValueError(f"objective.tail = {tail}: the teacher sent {given}, expected one each")
    return signal.sampled_logprobs_N.detach().to(dtype).masked_fill(~tokens.mask_N, 0)


def _require_ids(num_ids: int, *, tail: Tail) -> None:
    if tail == "renormalise" and num_ids < 2:
        raise ValueError(
            f"objective.top_k = {num_ids}: expected at least 2; renormalised in one id, loss and gradient are always 0"
        )
    if num_ids < 1:
        raise ValueError(f"objective.top_k = {num_ids}: expected at least 1; a support without ids has no loss")
