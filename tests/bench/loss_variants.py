"""The losses under comparison: of one objective, ours, the full-logits version, and another library's where it has one.

Each takes a problem and returns the mean loss over its tokens, a scalar with gradients in the student's states and
head. Suffixes: N tokens, K support, V vocabulary, D hidden size.
"""

from collections.abc import Callable

import torch
from loss_problem import Problem
from torch import Tensor

from opd_ray.objectives import OBJECTIVES, HiddenSignal, ObjectiveOptions, SampledSignal, SupportSignal, Tokens

_LIGER_CHUNK_TOKENS = 1024  # its default


def _tokens(problem: Problem) -> Tokens:
    device, num_tokens = problem.ids_N.device, problem.num_tokens
    return Tokens(
        ids_N=problem.ids_N,
        offsets=torch.tensor([0, num_tokens], device=device),
        mask_N=torch.ones(num_tokens, dtype=torch.bool, device=device),
        weights_N=torch.full((num_tokens,), 1 / num_tokens, device=device),
        sampler_logprobs_N=problem.student_logprobs_N,
        advantages_N=torch.zeros(num_tokens, device=device),
    )


def _ours(problem: Problem, *, objective: str, signal: object, options: ObjectiveOptions) -> Tensor:
    losses = OBJECTIVES[objective].losses(
        problem.hidden_ND, problem.head_VD, tokens=_tokens(problem), signal=signal, options=options
    )
    return losses.loss


def full_ours(problem: Problem) -> Tensor:
    """Return the mean KL(student || teacher) over the vocabulary."""
    signal = HiddenSignal(hidden_ND=problem.teacher_hidden_ND, head_VD=problem.teacher_head_VD)
    return _ours(problem, objective="full", signal=signal, options=ObjectiveOptions(diagnostic_tokens=0))


def _support_ours(problem: Problem, options: ObjectiveOptions) -> Tensor:
    signal = SupportSignal(
        ids_NK=problem.support_ids_NK,
        logprobs_NK=problem.support_logprobs_NK,
        sampled_logprobs_N=torch.empty(0, device=problem.ids_N.device),
    )
    return _ours(problem, objective="support", signal=signal, options=options)


def support_ours(problem: Problem) -> Tensor:
    """Return the mean KL(student || teacher) after renormalising both in the support."""
    return _support_ours(problem, ObjectiveOptions(diagnostic_tokens=0, tail="renormalise"))


def support_tail_ours(problem: Problem) -> Tensor:
    """Return the mean KL(student || teacher) over the support and one bucket for all that is outside of it."""
    return _support_ours(problem, ObjectiveOptions(diagnostic_tokens=0, tail="bucket"))


def sampled_ours(problem: Problem) -> Tensor:
    """Return the mean log-ratio log p(y) - log q(y), with the gradient of the policy gradient that has it as cost."""
    signal = SampledSignal(logprobs_N=problem.teacher_logprobs_N)
    return _ours(problem, objective="sampled", signal=signal, options=ObjectiveOptions(diagnostic_tokens=0))


def _student_logits(problem: Problem) -> Tensor:
    return (problem.hidden_ND @ problem.head_VD.T).float()


def full_naive(problem: Problem) -> Tensor:
    """Return what `full_ours` does, from the logits of all tokens."""
    log_p_NV = _student_logits(problem).log_softmax(-1)
    with torch.no_grad():
        log_q_NV = (problem.teacher_hidden_ND @ problem.teacher_head_VD.T).float().log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean()


def support_naive(problem: Problem) -> Tensor:
    """Return what `support_ours` does, from the logits of all tokens."""
    log_p_NK = _student_logits(problem).gather(-1, problem.support_ids_NK).log_softmax(-1)
    log_q_NK = problem.support_logprobs_NK.log_softmax(-1)
    return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1).mean()


def support_tail_naive(problem: Problem) -> Tensor:
    """Return what `support_tail_ours` does, from the logits of all tokens."""
    log_p_NK = _student_logits(problem).log_softmax(-1).gather(-1, problem.support_ids_NK)
    log_q_NK = problem.support_logprobs_NK
    p_tail_N, q_tail_N = 1 - log_p_NK.exp().sum(-1), 1 - log_q_NK.exp().sum(-1)
    in_support_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
    return (in_support_N + p_tail_N * (p_tail_N / q_tail_N).log()).mean()


def sampled_naive(problem: Problem) -> Tensor:
    """Return what `sampled_ours` does, from the logits of all tokens."""
    log_p_N = _student_logits(problem).log_softmax(-1).gather(-1, problem.ids_N[:, None])[:, 0]
    cost_N = log_p_N.detach() - problem.teacher_logprobs_N
    return (cost_N * (log_p_N - log_p_N.detach()).exp()).mean()


def full_liger(problem: Problem) -> Tensor:
    """Return what `full_ours` does, from Liger's chunked fused-linear JSD at beta 1, which is this divergence."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # on the path in the benchmark only

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False, chunk_size=_LIGER_CHUNK_TOKENS
    )
    teacher = problem.teacher_hidden_ND, problem.teacher_head_VD
    result: Tensor = loss(problem.hidden_ND, problem.head_VD, *teacher, problem.ids_N)
    return result


VARIANTS: dict[str, dict[str, Callable[[Problem], Tensor]]] = {
    "full": {"naive": full_naive, "liger": full_liger, "ours": full_ours},
    "support": {"naive": support_naive, "ours": support_ours},
    "support_tail": {"naive": support_tail_naive, "ours": support_tail_ours},
    "sampled": {"naive": sampled_naive, "ours": sampled_ours},
}
