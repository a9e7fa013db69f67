"""The full-vocabulary objective: an exact divergence from the teacher's hidden states.

Suffixes: N tokens, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor

from opd_ray.objectives.diagnostics import diagnose
from opd_ray.objectives.divergences import Divergence
from opd_ray.objectives.equivalence import Equivalence, merging
from opd_ray.objectives.head import WholeHead, head_losses, teacher_rows
from opd_ray.objectives.objective import Losses, ObjectiveOptions
from opd_ray.objectives.rows import RowLosses, blocks, common_vocabulary, logsumexp, widest_dtype
from opd_ray.objectives.signals import HiddenSignal, Tokens, check_num_tokens


def losses(
    hidden_ND: Tensor, head_VD: Tensor, *, tokens: Tokens, signal: HiddenSignal, options: ObjectiveOptions
) -> Losses:
    """Return loss_t = D(p, q) over the common vocabulary at the sampled prefixes, D the options' divergence.

    With the reverse KL, sum_v p (log p - log q), the gradient in the student's logits is p (log p - log q - loss): what
    `sampled` at discount 0 has in expectation over y_t, without its noise. divergence_N is the loss itself, exact
    and >= 0. Both models' logits are divided by the temperature; heads of different sizes are cut to the common
    range before the softmax. Stats: `signal`, |log p(y_t) - log q(y_t)|.

    hidden_ND [N,D], head_VD [V,D]; the teacher has its own D and V and gets no gradient; nats. Standard.
    Choose it when the exact signal is worth 2D bytes a token and products with both heads.
    """
    check_num_tokens(tokens, hidden_ND=hidden_ND, signal_N=signal.hidden_ND)
    tokens = tokens.cleared()
    dtype = widest_dtype(hidden_ND, head_VD)
    vocab_size = common_vocabulary(options.vocab_size, head_VD, signal.head_VD)
    equivalence = Equivalence.of(options.equivalent_ids, device=hidden_ND.device, vocab_size=vocab_size)
    ids_N = equivalence.canonical(tokens.ids_N)
    teacher_logits = teacher_rows(signal, tokens=tokens, vocab_size=vocab_size, options=options, dtype=dtype)

    def row_loss(rows: slice, logits_NV: Tensor, wanted: bool) -> RowLosses:
        teacher_NV = equivalence.merge(teacher_logits(rows))
        sampled_N, teacher_N = (z_NV.gather(1, ids_N[rows][:, None]).squeeze(1) for z_NV in (logits_NV, teacher_NV))
        loss_N, lse_N, teacher_lse_N = divergence_of_logits(
            logits_NV, teacher_NV, divergence=options.divergence, wanted=wanted
        )
        cost_N = sampled_N - lse_N - teacher_N + teacher_lse_N
        return RowLosses(
            loss_N=loss_N,
            slope_NV=logits_NV if wanted else None,
            divergence_N=loss_N,
            logprobs_N=sampled_N - lse_N,
            stats={"signal": cost_N.abs(), "negative_reward": (cost_N > 0).to(cost_N.dtype)},
        )

    chunk_tokens = max(1, options.chunk_tokens // 2)
    head = WholeHead(head_VD, vocab_size=vocab_size, dtype=dtype, chunk_tokens=chunk_tokens)
    result = head_losses(
        hidden_ND,
        head_VD,
        head=head,
        row_loss=merging(row_loss, equivalence, ids_N=tokens.ids_N),
        tokens=tokens,
        temperature=options.temperature,
    )
    return result.with_diagnostics(diagnose(hidden_ND, head_VD, tokens=tokens, options=options))


def divergence_of_logits(
    logits_NV: Tensor, teacher_NV: Tensor, *, divergence: Divergence, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence [N] of two rows of logits, and the student's and the teacher's log-normaliser [N].

    Block by block. Overwrites both: logits_NV becomes the gradient with respect to itself when that is wanted.
    """
    lse_N, teacher_lse_N = logsumexp(logits_NV), logsumexp(teacher_NV)
    total_N, slopes_N = torch.zeros_like(lse_N), torch.zeros_like(lse_N)
    for log_p_NV, log_q_NV in blocks(logits_NV, teacher_NV):
        phi_NV = divergence.terms_(log_p_NV.sub_(lse_N[:, None]), log_q_NV.sub_(teacher_lse_N[:, None]))
        part_N = phi_NV.sum(-1)
        total_N += part_N
        slopes_N += part_N if phi_NV is log_q_NV else log_q_NV.sum(-1)
    if wanted:
        for p_NV, slope_NV in blocks(logits_NV, teacher_NV):
            torch.addcmul(slope_NV, p_NV, slopes_N[:, None], value=-1, out=p_NV)
    return total_N, lse_N, teacher_lse_N
