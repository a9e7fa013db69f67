"""The support objective: reverse KL after renormalising both models in a small set of ids.

Suffixes: N tokens, K support, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor

from opd_ray.objectives.divergences import reverse_kl
from opd_ray.objectives.gathered_logits import gathered_logits
from opd_ray.objectives.logits import common_vocabulary, token_logprobs, widest_dtype
from opd_ray.objectives.objective import ObjectiveOptions, TokenLosses
from opd_ray.objectives.signals import SupportSignal, Tokens, check_num_tokens


def token_losses(
    hidden_ND: Tensor, head_VD: Tensor, *, tokens: Tokens, signal: SupportSignal, options: ObjectiveOptions
) -> TokenLosses:
    """Return loss_t = KL(p^ || q^) = sum_S p^ (log p^ - log q^), with p^ = softmax(z_S) and q^ = q renormalised in S.

    The gradient in the logits is p^ (log p^ - log q^ - loss) in S and 0 outside: the loss says nothing about the mass
    that the student has outside S. divergence_N is the loss itself: >= 0, but no bound on the full KL.

    Only the K head rows of S are read. sampled_logprobs_N needs the whole head, so it covers the first
    `options.diagnostic_tokens` tokens only and is empty for 0. hidden_ND [N,D], head_VD [V,D]; nats.
    Source: arXiv 2603.25562 ("local support matching"). Choose it by default: nearly the signal of `full` for a
    payload and a cost that do not grow with the vocabulary. Raises ValueError for K < 2.
    """
    check_num_tokens(tokens, hidden_ND=hidden_ND, signal_N=signal.ids_NK)
    top_k = signal.ids_NK.shape[1]
    if top_k < 2:
        raise ValueError(
            f"objective.top_k = {top_k}: expected at least 2; renormalised in one id, loss and gradient are always 0"
        )
    vocab_size = common_vocabulary(options.vocab_size, head_VD)
    in_support_NK = (signal.ids_NK >= 0) & (signal.ids_NK < vocab_size) & tokens.mask_N[:, None]
    logits_NK = gathered_logits(
        hidden_ND.masked_fill(~tokens.mask_N[:, None], 0),
        head_VD,
        ids_NK=signal.ids_NK.masked_fill(~in_support_NK, 0),
        chunk_tokens=options.chunk_tokens,
    )
    loss_N = reverse_kl(
        _renormalised(logits_NK / options.temperature, in_support_NK),
        _renormalised(signal.logprobs_NK.detach().to(logits_NK.dtype), in_support_NK),
    )
    return TokenLosses(
        loss_N=loss_N,
        divergence_N=loss_N.detach(),
        sampled_logprobs_N=_diagnostic_logprobs(hidden_ND, head_VD, tokens=tokens, options=options),
    )


def _renormalised(scores_NK: Tensor, in_support_NK: Tensor) -> Tensor:
    # The lowest finite number and not -inf: an absent id then has a log-ratio of 0, not NaN, and a token without any
    # id (masked) has two uniform distributions, so that its loss and gradient are exactly 0.
    return scores_NK.masked_fill(~in_support_NK, torch.finfo(scores_NK.dtype).min).log_softmax(dim=-1)


def _diagnostic_logprobs(hidden_ND: Tensor, head_VD: Tensor, *, tokens: Tokens, options: ObjectiveOptions) -> Tensor:
    first = slice(options.diagnostic_tokens)
    if options.diagnostic_tokens == 0:
        return torch.empty(0, dtype=widest_dtype(hidden_ND, head_VD), device=hidden_ND.device)
    with torch.no_grad():
        return token_logprobs(
            hidden_ND[first], head_VD, ids_N=tokens.ids_N[first], mask_N=tokens.mask_N[first], options=options
        )
