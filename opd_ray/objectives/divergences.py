"""Divergences between two categorical distributions at one prefix, from their log-probs.

Suffixes: N tokens, V the outcomes (the vocabulary, or a support in which both sides are normalised). Nats.
"""

from torch import Tensor


def reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Return KL(p || q) = sum_v p (log p - log q) for each token, [N], >= 0 up to rounding.

    Both sides must be normalised over V; log_p_NV must come from a log-softmax. The gradient with respect to the
    logits is then p * (log p - log q - KL): the log-ratio is held constant because the part through it,
    sum_v p grad(log p), is 0 for any p, and would only add rounding (with it, p == q gives 1e-7 and not 0).
    For the same reason second derivatives are wrong.
    """
    log_ratio_NV = (log_p_NV - log_q_NV).detach()
    return (log_p_NV.exp() * log_ratio_NV).sum(dim=-1)
