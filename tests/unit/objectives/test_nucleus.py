"""Samples from a top-p nucleus, against a log-softmax with an explicit mask, in float64."""

from dataclasses import replace

import pytest
import torch
from objective_oracles import Problem, assert_agrees, gradients, losses_of, naive_returns, random_problem
from torch import Tensor

from opd_ray.objectives import PolicyOptions

VOCAB = 12


def nucleus(p_NV: Tensor, *, top_p: float) -> Tensor:
    """The smallest set of the likeliest ids with a mass of top_p or more, literally, bool [N,V]."""
    inside_NV = torch.zeros_like(p_NV, dtype=torch.bool)
    for row, p_V in enumerate(p_NV):
        mass = 0.0
        for id_ in p_V.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            inside_NV[row, id_] = True
            mass += float(p_V[id_])
    return inside_NV


def nucleus_problem(*, top_p: float, temperature: float = 1.0) -> tuple[Problem, Tensor]:
    """Every token in its nucleus: in turn the likeliest, the second likeliest, and the last that is still in."""
    problem = random_problem(masked=(2,))
    inside_NV = nucleus(problem.log_p(temperature).detach().exp(), top_p=top_p)
    order_NV = problem.log_p().detach().argsort(-1, descending=True)
    rank_N = torch.minimum(torch.tensor([0, 1, VOCAB] * 4)[:11], inside_NV.sum(-1) - 1)
    ids_N = order_NV.gather(1, rank_N[:, None]).squeeze(1)
    return replace(problem, tokens=replace(problem.tokens, ids_N=ids_N)), inside_NV


def masked_log_p(problem: Problem, inside_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    return problem.log_p(temperature).masked_fill(~inside_NV, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_policy_is_the_student_renormalised_in_its_nucleus(top_p: float, temperature: float) -> None:
    problem, inside_NV = nucleus_problem(top_p=top_p, temperature=temperature)
    policy = PolicyOptions(top_p=top_p, discount=0.5)
    losses = losses_of("sampled", problem, policy=policy, temperature=temperature, chunk_tokens=4)
    log_p_N = problem.sampled(masked_log_p(problem, inside_NV, temperature=temperature)).where(problem.tokens.mask_N, 0)
    tokens = problem.tokens
    costs_N = (log_p_N.detach() - problem.sampled(problem.log_q(temperature))) * tokens.mask_N
    returns_N = naive_returns(costs_N, offsets=tokens.offsets, discount=0.5)
    naive_N = (returns_N - tokens.advantages_N) * (log_p_N - log_p_N.detach()).exp() * tokens.mask_N
    assert_agrees(losses, naive_N, problem, tolerance=1e-12)
    torch.testing.assert_close(losses.sampled_logprobs_N, log_p_N.detach() * tokens.mask_N, rtol=0, atol=1e-12)
    ratio_N = (log_p_N.detach() - tokens.sampler_logprobs_N).exp() * tokens.mask_N
    torch.testing.assert_close(losses.stats["ratio"], ratio_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_ids_outside_the_nucleus_have_no_gradient(top_p: float) -> None:
    problem, inside_NV = nucleus_problem(top_p=top_p)
    logits_NV = problem.log_p().detach().requires_grad_()
    eye = torch.eye(VOCAB, dtype=torch.float64)
    losses = losses_of("sampled", replace(problem, hidden_ND=logits_NV, head_VD=eye), policy=PolicyOptions(top_p=top_p))
    (gradient_NV,) = torch.autograd.grad(losses.loss, logits_NV)
    assert gradient_NV[~inside_NV].abs().max() == 0
    several_N = (inside_NV.sum(-1) > 1) & problem.tokens.mask_N
    assert gradient_NV[inside_NV & several_N[:, None]].abs().min() > 0


def test_the_kl_baseline_is_that_of_the_policy_in_its_nucleus() -> None:
    problem, inside_NV = nucleus_problem(top_p=0.8)
    with_baseline, without = (
        losses_of("sampled", problem, policy=PolicyOptions(top_p=0.8, kl_baseline=kl_baseline)).loss_N
        for kl_baseline in (True, False)
    )
    log_p_NV = masked_log_p(problem, inside_NV).detach()
    kl_N = (log_p_NV.exp() * (log_p_NV - problem.log_q())).where(inside_NV, 0).sum(-1)
    torch.testing.assert_close(with_baseline, without - kl_N * problem.tokens.mask_N, rtol=0, atol=1e-12)


def test_over_the_nucleus_the_expected_gradient_is_that_of_its_kl() -> None:
    """The set itself is held fixed."""
    problem, inside_NV = nucleus_problem(top_p=0.8)
    inside_V, row = inside_NV[3], 3
    ids_K = inside_V.nonzero().flatten()
    num_ids = len(ids_K)
    assert 1 < num_ids < VOCAB
    log_p_V = masked_log_p(problem, inside_NV)[row]
    tokens = problem.tokens
    every = replace(
        problem,
        hidden_ND=problem.hidden_ND[row].expand(num_ids, -1),
        teacher_hidden_ND=problem.teacher_hidden_ND[row].expand(num_ids, -1),
        tokens=replace(
            tokens,
            ids_N=ids_K,
            offsets=torch.arange(num_ids + 1),
            mask_N=torch.ones(num_ids, dtype=torch.bool),
            weights_N=log_p_V[ids_K].detach().exp(),
            sampler_logprobs_N=torch.zeros(num_ids),
            advantages_N=torch.full((num_ids,), 0.3),
        ),
    )
    loss = losses_of("sampled", every, policy=PolicyOptions(top_p=0.8)).loss
    kl = (log_p_V[ids_K].exp() * (log_p_V[ids_K] - problem.log_q()[row, ids_K])).sum()
    for actual, expected in zip(gradients(loss, problem), gradients(kl, problem), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sampled_token_that_has_left_the_nucleus_stays_in_the_policy(dtype: torch.dtype) -> None:
    """As after an update since it was sampled: its log-prob is finite, and between raw and certain."""
    problem = random_problem(dtype=dtype)
    raw_N, ids_N = problem.log_p().detach().min(-1)
    problem = replace(problem, tokens=replace(problem.tokens, ids_N=ids_N))
    losses = losses_of("sampled", problem, policy=PolicyOptions(top_p=0.3))
    assert losses.sampled_logprobs_N.isfinite().all()
    assert (losses.sampled_logprobs_N >= raw_N - 1e-5).all()
    assert (losses.sampled_logprobs_N < 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(losses.loss, problem))
    assert gradients(losses_of("sampled", problem, policy=PolicyOptions(top_p=0.3)).loss, problem)[0].norm() > 0


def test_equal_logits_at_the_border_are_all_in() -> None:
    """Of equals none is preferred: the sampler may have kept any of them."""
    problem = random_problem(lengths=(1,))
    logits_NV = torch.tensor([[2.0, 1, 1, 1, 1, *[-3.0] * 7]], dtype=torch.float64).requires_grad_()
    eye = torch.eye(VOCAB, dtype=torch.float64)
    problem = replace(problem, hidden_ND=logits_NV, head_VD=eye)
    losses = losses_of("sampled", problem, policy=PolicyOptions(top_p=0.5))
    (gradient_NV,) = torch.autograd.grad(losses.loss, logits_NV)
    assert (gradient_NV[0, :5] != 0).all()


def test_a_sampled_token_outside_the_nucleus_brings_no_other_id_along() -> None:
    """The policy is the nucleus and the sampled id: the ids between them stay out."""
    problem = random_problem(lengths=(1,))
    logits_NV = torch.tensor([[3.0, 2.0, 1.0, 0.0, *[-5.0] * 8]], dtype=torch.float64).requires_grad_()
    eye = torch.eye(VOCAB, dtype=torch.float64)
    tokens = replace(problem.tokens, ids_N=torch.tensor([3]))
    losses = losses_of(
        "sampled",
        replace(problem, hidden_ND=logits_NV, head_VD=eye, tokens=tokens),
        policy=PolicyOptions(top_p=0.3),
    )
    expected = logits_NV.detach()[0, [0, 3]].log_softmax(-1)[1]
    torch.testing.assert_close(losses.sampled_logprobs_N[0], expected, rtol=0, atol=1e-12)
    (gradient_NV,) = torch.autograd.grad(losses.loss, logits_NV)
    assert gradient_NV[0].nonzero().flatten().tolist() == [0, 3]


def test_with_equivalent_ids_the_nucleus_is_one_of_merged_outcomes() -> None:
    """No member of the class is likely by itself, the class as a whole is the likeliest outcome."""
    problem = random_problem(lengths=(1,))
    mass_V = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.2], dtype=torch.float64)  # 2, 3 and 4 are one outcome
    logits_NV = torch.cat([mass_V.log(), torch.full((VOCAB - 5,), -50.0)])[None].double().requires_grad_()
    tokens = replace(problem.tokens, ids_N=torch.tensor([3]))
    merged = replace(problem, hidden_ND=logits_NV, head_VD=torch.eye(VOCAB, dtype=torch.float64), tokens=tokens)

    def gradient_at(top_p: float) -> list[int]:
        losses = losses_of("sampled", merged, policy=PolicyOptions(top_p=top_p), equivalent_ids=((2, 3, 4),))
        (gradient_NV,) = torch.autograd.grad(losses.loss, logits_NV)
        return (gradient_NV[0].abs() > 1e-12).nonzero().flatten().tolist()

    # Mass 0.6 of the class alone, then 0.9 with id 0. Over the raw ids 0.3 + 0.2 + 0.2 would be needed for 0.65.
    assert gradient_at(0.55) == []  # one outcome of probability 1: nothing to learn
    assert gradient_at(0.65) == [0, 2, 3, 4]
    losses = losses_of("sampled", merged, policy=PolicyOptions(top_p=0.65), equivalent_ids=((2, 3, 4),))
    assert float(losses.sampled_logprobs_N[0].exp()) == pytest.approx(0.2 / 0.9, abs=1e-12)
