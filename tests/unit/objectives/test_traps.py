"""Objectives that look right and teach nothing: why they are not offered, by enumeration."""

from dataclasses import replace

import pytest
import torch
from objective_enumeration import enumerate_sequences
from objective_oracles import losses_of, random_problem

from opd_ray.objectives import PolicyOptions, SampledSignal


def test_a_detached_top_k_kl_as_the_tokens_cost_has_no_expected_gradient() -> None:
    """Trap 1: it does not depend on the token that was sampled, so at discount 0 it is a baseline and no signal."""
    problem = enumerate_sequences(vocab_size=4, length=2)
    support = problem.losses("support", signal=problem.support_signal(2))
    kl_ST = support.loss_N.view_as(problem.ids_ST)
    assert kl_ST.std() > 0.05
    as_reward = problem.losses("sampled", tokens=problem.with_costs(kl_ST))
    torch.testing.assert_close(as_reward.loss_N, support.loss_N, rtol=0, atol=1e-12)
    assert problem.gradient(as_reward.loss).norm() < 1e-12
    literal = (problem.probability_S()[:, None] * kl_ST * problem.log_p_ST()).sum()
    assert problem.gradient(literal).norm() < 1e-12
    assert problem.gradient(support.loss).norm() > 0.05


def test_the_log_ratio_as_a_loss_has_no_teacher_in_its_gradient_and_no_expected_gradient() -> None:
    """Trap 2: grad (log p - log q)(y) = grad log p(y), whose expectation is 0."""
    problem = enumerate_sequences(vocab_size=4, length=2)
    weights_N = problem.tokens.weights_N
    log_ratio_N = (problem.log_p_ST() - problem.log_q_ST).flatten()
    torch.testing.assert_close((weights_N * log_ratio_N).sum(), problem.sequence_kl())
    assert problem.gradient((weights_N * log_ratio_N).sum()).norm() < 1e-12
    ours = problem.losses("sampled")
    torch.testing.assert_close(ours.loss, problem.sequence_kl(), rtol=0, atol=1e-12)
    assert problem.gradient(ours.loss).norm() > 0.1


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_the_gradient_depends_on_the_teacher(discount: float) -> None:
    problem = random_problem()
    ours, wrong = [], []
    for shift in (0.0, 1.0):
        log_q_N = problem.sampled(problem.log_q()) - shift * torch.arange(11)
        signal = SampledSignal(logprobs_N=log_q_N)
        loss = losses_of("sampled", problem, signal=signal, policy=PolicyOptions(discount=discount)).loss
        ours.append(torch.autograd.grad(loss, problem.hidden_ND)[0])
        log_ratio_N = problem.sampled(problem.log_p()) - log_q_N
        wrong.append(torch.autograd.grad(log_ratio_N.sum(), problem.hidden_ND)[0])
    assert torch.equal(wrong[0], wrong[1])
    assert (ours[0] - ours[1]).norm() > 0.1


def test_costs_of_masked_tokens_do_not_flow_into_earlier_returns() -> None:
    """Trap 9: a teacher that hates a masked token must not reach the tokens before it."""
    problem = random_problem(masked=(2, 8))
    log_q_N = problem.sampled(problem.log_q())
    results = []
    for shift in (0.0, 1000.0):
        shifted_N = log_q_N - shift * ~problem.tokens.mask_N
        losses = losses_of(
            "sampled",
            problem,
            signal=SampledSignal(logprobs_N=shifted_N),
            policy=PolicyOptions(discount=1.0),
            chunk_tokens=2,
        )
        results.append((losses.loss_N, losses.divergence_N, *torch.autograd.grad(losses.loss, problem.leaves())))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_mask_cuts_the_cost_but_not_the_distance_that_the_discount_counts() -> None:
    problem = random_problem(masked=(1,), lengths=(3,))
    problem = replace(problem, tokens=replace(problem.tokens, advantages_N=torch.zeros(3)))
    losses = losses_of("sampled", problem, policy=PolicyOptions(discount=0.5))
    costs_N = losses.divergence_N
    assert costs_N[1] == 0
    torch.testing.assert_close(losses.loss_N[0], costs_N[0] + 0.25 * costs_N[2])
