"""Divergences between student and teacher at one prefix, as elementwise terms with the derivative in closed form.

p is the student, q the teacher, both categorical over the same outcomes (the vocabulary, a support, a support and its
tail). Suffixes: N tokens, V outcomes. Log-probs in nats; an outcome that is not there has log-prob `ABSENT` on both
sides, and contributes nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ABSENT = -1e30  # finite, so that the difference of two absent log-probs is 0 and not NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A divergence sum_v phi(p_v, q_v), and the derivative of its terms.

    `terms_(log_p, log_q)` returns phi, elementwise, and overwrites its arguments: log_p with p, log_q with a slope such
    that  d phi / d log p = slope + constant * p. The rows are as wide as the vocabulary, so memory is reused. Over a
    normalised p the constant cancels in the gradient with respect to the logits, which is slope - p * sum(slope):
    dropping it there keeps p == q at exactly 0. Where p is not normalised (the raw head of a support) or only one
    outcome is seen (a sampled tail), it must be put back.
    """

    terms_: Callable[[Tensor, Tensor], Tensor]
    constant: float

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence of each token [N] and its gradient with respect to the logits of p [N,V].

        Both sides must be normalised over V.
        """
        phi_NV, slope_NV = self.terms(log_p_NV, log_q_NV)
        return phi_NV.sum(-1), slope_NV - log_p_NV.exp() * slope_NV.sum(-1, keepdim=True)

    def terms(self, log_p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return phi and the slope, and leave the arguments as they are."""
        p_NV, slope_NV = log_p_NV.clone(), log_q_NV.clone()
        return self.terms_(p_NV, slope_NV), slope_NV


def reverse_kl() -> Divergence:
    """KL(p || q): phi = p (log p - log q); the gradient in the logits is p (log p - log q - KL). Mode-seeking."""

    def terms_(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        torch.sub(log_p_NV, log_q_NV, out=log_q_NV)
        return log_q_NV.mul_(log_p_NV.exp_())

    return Divergence(terms_=terms_, constant=1.0)


def forward_kl() -> Divergence:
    """KL(q || p): phi = q (log q - log p); the gradient in the logits is p - q. Mode-covering, hardly hurt by stale
    data."""

    def terms_(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        q_NV = log_q_NV.exp()
        phi_NV = (log_q_NV - log_p_NV).mul_(q_NV)
        torch.sub(log_p_NV.exp_(), q_NV, out=log_q_NV)
        return phi_NV

    return Divergence(terms_=terms_, constant=-1.0)


def generalised_jsd(beta: float) -> Divergence:
    """JSD(beta) = beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q; bounded by log 2 at 1/2.

    beta -> 0, divided by beta, is the forward KL and beta -> 1, divided by 1 - beta, the reverse KL; at 0 and 1 exactly
    those are returned, as is the convention of the field. Source: GKD, arXiv 2306.13649 (there P_T is our q).
    """
    if beta in (0, 1):
        return reverse_kl() if beta == 1 else forward_kl()
    log_beta, log_rest = math.log(beta), math.log1p(-beta)

    def terms_(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        log_m_NV = torch.logaddexp(log_p_NV + log_rest, log_q_NV + log_beta)
        teacher_NV = (log_q_NV - log_m_NV).mul_(log_q_NV.exp()).mul_(beta)
        torch.sub(log_p_NV, log_m_NV, out=log_q_NV)
        log_q_NV.mul_(log_p_NV.exp_()).mul_(1 - beta)
        return teacher_NV.add_(log_q_NV)

    return Divergence(terms_=terms_, constant=0.0)


def skewed_reverse_kl(alpha: float) -> Divergence:
    """KL(p || s), s = (1 - alpha) q + alpha p: finite and with bounded log-ratio where q vanishes; alpha 0 is reverse.

    Source: DistiLLM, arXiv 2402.03898 (skew reverse KL).
    """
    if alpha == 0:
        return reverse_kl()
    log_alpha, log_rest = math.log(alpha), math.log1p(-alpha)

    def terms_(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        log_s_NV = torch.logaddexp(log_q_NV + log_rest, log_p_NV + log_alpha)
        log_ratio_NV, p_NV = log_p_NV - log_s_NV, log_p_NV.exp_()
        log_q_NV.copy_(p_NV * (log_ratio_NV + alpha * (1 - log_ratio_NV.exp())))
        return log_ratio_NV.mul_(p_NV)

    return Divergence(terms_=terms_, constant=1.0 - alpha)


def mixed_kl(forward_weight: float) -> Divergence:
    """forward_weight * KL(q || p) + (1 - forward_weight) * KL(p || q)."""
    forward, reverse = forward_kl(), reverse_kl()

    def terms_(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        forward_phi_NV, forward_slope_NV = forward.terms(log_p_NV, log_q_NV)
        reverse.terms_(log_p_NV, log_q_NV)  # phi and slope of the reverse KL are the same
        reverse_NV = log_q_NV.mul_(1 - forward_weight)
        phi_NV = forward_phi_NV.mul_(forward_weight).add_(reverse_NV)
        reverse_NV.add_(forward_slope_NV, alpha=forward_weight)
        return phi_NV

    return Divergence(
        terms_=terms_,
        constant=forward_weight * forward.constant + (1 - forward_weight) * reverse.constant,
    )
