"""Student and teacher side by side, token by token: what an evaluation shows of them. Nothing is learned from it.

Suffixes: N tokens, V vocabulary, D hidden size, K likeliest ids, A alternatives.
"""

import torch
from torch import Tensor

from opd_ray.objectives.head import WholeHead, head_losses, teacher_rows
from opd_ray.objectives.objective import Losses, Objective, ObjectiveOptions
from opd_ray.objectives.rows import RowLosses, blocks, common_vocabulary, logsumexp, widest_dtype
from opd_ray.objectives.signals import HiddenSignal, Tokens, check_num_tokens

TOP_K = 16  # ids whose overlap and mass are told
NUM_ALTERNATIVES = 5


def losses(
    hidden_ND: Tensor, head_VD: Tensor, *, tokens: Tokens, signal: HiddenSignal, options: ObjectiveOptions
) -> Losses:
    """Return KL(p || q) at every token as divergence_N, exact over the common vocabulary, and as stats, [N]:

    `teacher_logprob` log q(y), `student_entropy` and `teacher_entropy` in nats, `topk_overlap` of the two sets of K
    likeliest ids as a share of K, `student_mass_in_teacher_topk`, `teacher_mass_in_student_topk`; [N,A]:
    `student_top_ids`, `student_top_logprobs` and the teacher's. K is 16, or the whole vocabulary where that is less.
    loss is 0; call it without gradients.
    """
    check_num_tokens(tokens, hidden_ND=hidden_ND, signal_N=signal.hidden_ND)
    tokens = tokens.cleared()
    dtype = widest_dtype(hidden_ND, head_VD)
    vocab_size = common_vocabulary(options.vocab_size, head_VD, signal.head_VD)
    teacher_logits = teacher_rows(signal, tokens=tokens, vocab_size=vocab_size, options=options, dtype=dtype)

    def row_loss(rows: slice, logits_NV: Tensor, _: bool) -> RowLosses:
        log_p_NV, log_q_NV = _normalised(logits_NV), _normalised(teacher_logits(rows))
        ids_N1 = tokens.ids_N[rows][:, None]
        kl_N, entropy_p_N, entropy_q_N = _sums(log_p_NV, log_q_NV)
        return RowLosses(
            loss_N=torch.zeros_like(kl_N),
            slope_NV=None,
            divergence_N=kl_N,
            logprobs_N=log_p_NV.gather(1, ids_N1).squeeze(1),
            stats={
                "teacher_logprob": log_q_NV.gather(1, ids_N1).squeeze(1),
                "student_entropy": entropy_p_N,
                "teacher_entropy": entropy_q_N,
                **_tops(log_p_NV, log_q_NV),
            },
        )

    chunk_tokens = max(1, options.chunk_tokens // 2)
    head = WholeHead(head_VD, vocab_size=vocab_size, dtype=dtype, chunk_tokens=chunk_tokens)
    result = head_losses(
        hidden_ND, head_VD, head=head, row_loss=row_loss, tokens=tokens, temperature=options.temperature
    )
    return result.with_diagnostics({})


def _normalised(logits_NV: Tensor) -> Tensor:
    """Turn logits into log-probs, in place."""
    return logits_NV.sub_(logsumexp(logits_NV)[:, None])


def _sums(log_p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(p || q), and the entropies of p and of q, [N], block by block."""
    kl_N, entropy_p_N, entropy_q_N = (torch.zeros_like(log_p_NV[:, 0]) for _ in range(3))
    for log_p, log_q in blocks(log_p_NV, log_q_NV):
        p = log_p.exp()
        kl_N += (p * (log_p - log_q)).sum(-1)
        entropy_p_N -= (p * log_p).sum(-1)
        entropy_q_N -= (log_q.exp() * log_q).sum(-1)
    return kl_N, entropy_p_N, entropy_q_N


def _tops(log_p_NV: Tensor, log_q_NV: Tensor) -> dict[str, Tensor]:
    k = min(TOP_K, log_p_NV.shape[1])
    log_p_NK, ids_p_NK = log_p_NV.topk(k)
    log_q_NK, ids_q_NK = log_q_NV.topk(k)
    return {
        "topk_overlap": (ids_p_NK[:, :, None] == ids_q_NK[:, None, :]).any(-1).to(log_p_NK.dtype).mean(-1),
        "student_mass_in_teacher_topk": log_p_NV.gather(1, ids_q_NK).exp().sum(-1),
        "teacher_mass_in_student_topk": log_q_NV.gather(1, ids_p_NK).exp().sum(-1),
        "student_top_ids": ids_p_NK[:, :NUM_ALTERNATIVES],
        "student_top_logprobs": log_p_NK[:, :NUM_ALTERNATIVES],
        "teacher_top_ids": ids_q_NK[:, :NUM_ALTERNATIVES],
        "teacher_top_logprobs": log_q_NK[:, :NUM_ALTERNATIVES],
    }


COMPARISON = Objective(payload=lambda _: "hidden", losses=losses)
