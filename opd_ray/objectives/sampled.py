"""The sampled-token objective: a policy gradient whose cost is the log-ratio of the sampled token.

Suffixes: N tokens, V vocabulary, D hidden size.
"""

from torch import Tensor

from opd_ray.objectives.logits import token_logprobs
from opd_ray.objectives.objective import ObjectiveOptions, TokenLosses
from opd_ray.objectives.returns import discounted_returns
from opd_ray.objectives.signals import SampledSignal, Tokens, check_num_tokens


def token_losses(
    hidden_ND: Tensor, head_VD: Tensor, *, tokens: Tokens, signal: SampledSignal, options: ObjectiveOptions
) -> TokenLosses:
    """Return loss_t = R_t log p(y_t), R_t = sum_{t' >= t} discount^(t' - t) r_t', r_t = log p(y_t) - log q(y_t).

    R_t is held constant, so the gradient is R_t grad(log p(y_t)); descending it lowers the cost, hence the KL. The
    value of the loss means nothing. Masked tokens cost 0 in every return. divergence_N is r_t: the k1 estimator of
    KL(student || teacher), unbiased and of either sign.

    discount 1: unbiased for the gradient of the sequence KL, variance up to T^4. 0: variance up to T^2; the expected
    gradient is that of the token KLs at fixed prefixes, the one that `full` computes without noise.
    hidden_ND [N,D], head_VD [V,D]; nats. Source: arXiv 2603.25562.
    Choose it when a teacher can give no more than the log-prob of the sampled token.
    """
    check_num_tokens(tokens, hidden_ND=hidden_ND, signal_N=signal.logprobs_N)
    logprobs_N = token_logprobs(hidden_ND, head_VD, ids_N=tokens.ids_N, mask_N=tokens.mask_N, options=options)
    sampled_logprobs_N = logprobs_N.detach()
    costs_N = (sampled_logprobs_N - signal.logprobs_N.detach()).masked_fill(~tokens.mask_N, 0)
    returns_N = discounted_returns(costs_N, offsets=tokens.offsets, discount=options.discount)
    return TokenLosses(
        loss_N=(returns_N * logprobs_N).masked_fill(~tokens.mask_N, 0),
        divergence_N=costs_N,
        sampled_logprobs_N=sampled_logprobs_N,
    )
