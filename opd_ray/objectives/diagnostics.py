"""Statistics of the student that need its whole vocabulary: for a few tokens, or to select tokens by entropy.

Suffixes: M leading tokens, N tokens, V vocabulary, D hidden size, K support.
"""

from dataclasses import replace

import torch
from torch import Tensor

from opd_ray.objectives.equivalence import Equivalence
from opd_ray.objectives.head import HeadLosses, WholeHead, head_losses
from opd_ray.objectives.objective import ObjectiveOptions
from opd_ray.objectives.rows import RowLosses, blocks, common_vocabulary, logsumexp, widest_dtype
from opd_ray.objectives.signals import Tokens
from opd_ray.objectives.weights import top_entropy_kept


def diagnose(
    hidden_ND: Tensor,
    head_VD: Tensor,
    *,
    tokens: Tokens,
    options: ObjectiveOptions,
    support_ids_NK: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return statistics [M] of the first options.diagnostic_tokens tokens, 0 where masked; {} when that is 0.

    `student_entropy` in nats, `sampled_logprob` log p(y_t), and with a support of canonical ids `support_student_mass`,
    sum_S p with classes of equivalent ids whole.
    Costs one product with the head for these tokens.
    """
    if options.diagnostic_tokens == 0:
        return {}
    first = slice(min(options.diagnostic_tokens, len(hidden_ND)))
    support_ids = None if support_ids_NK is None else support_ids_NK[first]
    result = _statistics(
        hidden_ND[first], head_VD, tokens=_leading(tokens, first), options=options, support_ids_NK=support_ids
    )
    return {"sampled_logprob": result.logprobs_N, **result.stats}


def keep_high_entropy(hidden_ND: Tensor, head_VD: Tensor, *, tokens: Tokens, options: ObjectiveOptions) -> Tokens:
    """Return the tokens with a weight of 0 for all but the options' fraction of highest entropy in each sequence.

    The entropy is the student's now, over the whole vocabulary: one product with the head more per token. The tokens
    without a loss still count in returns and metrics.
    """
    if options.entropy_fraction == 1:
        return tokens
    entropies_N = _statistics(hidden_ND, head_VD, tokens=tokens, options=options).stats["student_entropy"]
    kept_N = top_entropy_kept(
        entropies_N, offsets=tokens.offsets, mask_N=tokens.mask_N, fraction=options.entropy_fraction
    )
    return replace(tokens, weights_N=tokens.weights_N.masked_fill(~kept_N, 0))


def _statistics(
    hidden_ND: Tensor,
    head_VD: Tensor,
    *,
    tokens: Tokens,
    options: ObjectiveOptions,
    support_ids_NK: Tensor | None = None,
) -> HeadLosses:
    ids_N = tokens.cleared().ids_N
    equivalence = Equivalence.of(options.equivalent_ids, device=hidden_ND.device)

    def row_loss(rows: slice, logits_NV: Tensor, _: bool) -> RowLosses:
        lse_N = logsumexp(logits_NV)
        logprobs_N = logits_NV.gather(1, ids_N[rows][:, None]).squeeze(1) - lse_N
        entropy_N = torch.zeros_like(lse_N)
        for (block_NV,) in blocks(logits_NV):
            log_p_NV = block_NV - lse_N[:, None]
            entropy_N -= (log_p_NV.exp() * log_p_NV).sum(-1)
        stats = {"student_entropy": entropy_N}
        if support_ids_NK is not None:
            equivalence.merge(logits_NV)
            ids_NK = support_ids_NK[rows]
            in_support_NK = (ids_NK >= 0) & (ids_NK < logits_NV.shape[1])
            log_p_NK = logits_NV.gather(1, ids_NK.masked_fill(~in_support_NK, 0)) - lse_N[:, None]
            stats["support_student_mass"] = log_p_NK.exp().masked_fill(~in_support_NK, 0).sum(-1)
        return RowLosses(loss_N=entropy_N, slope_NV=None, divergence_N=entropy_N, logprobs_N=logprobs_N, stats=stats)

    head = WholeHead(
        head_VD,
        vocab_size=common_vocabulary(options.vocab_size, head_VD),
        dtype=widest_dtype(hidden_ND, head_VD),
        chunk_tokens=options.chunk_tokens,
    )
    with torch.no_grad():
        return head_losses(
            hidden_ND, head_VD, head=head, row_loss=row_loss, tokens=tokens, temperature=options.temperature
        )


def _leading(tokens: Tokens, first: slice) -> Tokens:
    return Tokens(
        ids_N=tokens.ids_N[first],
        offsets=tokens.offsets.clamp(max=first.stop),
        mask_N=tokens.mask_N[first],
        weights_N=tokens.weights_N[first],
        sampler_logprobs_N=tokens.sampler_logprobs_N[first],
        advantages_N=tokens.advantages_N[first],
    )
