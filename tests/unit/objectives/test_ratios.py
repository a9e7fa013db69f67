"""Importance ratios of stale samples against literal formulas by autograd, and by enumeration, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_enumeration import Enumeration, enumerate_sequences
from objective_oracles import Problem, assert_agrees, losses_of, naive_returns, random_problem
from torch import Tensor

from opd_ray.objectives import PolicyOptions, Tokens


def stale_problem(seed: int) -> Problem:
    """Ratios from 1/4 to 8, so that every clip is met; advantages of either sign."""
    problem = random_problem(seed=seed, masked=(2,), lengths=(20, 15, 25))
    generator = torch.Generator().manual_seed(seed)
    log_ratio_N = 3.4 * torch.rand(60, generator=generator, dtype=torch.float64) - 1.4
    log_p_N = problem.sampled(problem.log_p().detach())
    return replace(problem, tokens=replace(problem.tokens, sampler_logprobs_N=log_p_N - log_ratio_N))


def literal_loss(problem: Problem, policy: PolicyOptions) -> tuple[Tensor, Tensor]:
    """The surrogate in the words of the papers: maximise it in the advantage; and whether a ratio is cut."""
    tokens = problem.tokens
    log_p_N = problem.sampled(problem.log_p())
    costs_N = (log_p_N - problem.sampled(problem.log_q())).detach() * tokens.mask_N
    advantage_N = -naive_returns(costs_N, offsets=tokens.offsets, discount=policy.discount) + tokens.advantages_N
    ratio_N = (log_p_N - tokens.sampler_logprobs_N).exp()
    if policy.ratio == "truncated":
        weight_N = ratio_N.detach().clamp(max=policy.ratio_cap)
        objective_N = weight_N * advantage_N * (log_p_N - log_p_N.detach()).exp()
        return -objective_N * tokens.mask_N, ratio_N.detach() > policy.ratio_cap
    low, high = 1 - policy.ppo_clip, 1 + policy.ppo_clip
    ppo_N = torch.min(ratio_N * advantage_N, ratio_N.clamp(low, high) * advantage_N)
    dual_N = torch.max(ppo_N, policy.ppo_dual_clip * advantage_N)
    negative_N = advantage_N < 0
    flat_N = torch.where(negative_N, (ratio_N < low) | (ratio_N > policy.ppo_dual_clip), ratio_N > high)
    return -torch.where(negative_N, dual_N, ppo_N) * tokens.mask_N, flat_N


POLICIES = {
    "truncated at 2": PolicyOptions(ratio="truncated", ratio_cap=2.0),
    "truncated at 0.8": PolicyOptions(ratio="truncated", ratio_cap=0.8, discount=0.5),
    "ppo": PolicyOptions(ratio="ppo"),
    "ppo discounted": PolicyOptions(ratio="ppo", ppo_clip=0.4, ppo_dual_clip=1.5, discount=0.9),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_value_gradients_and_count_are_those_of_the_literal_formula(policy: PolicyOptions, seed: int) -> None:
    problem = stale_problem(seed)
    losses = losses_of("sampled", problem, policy=policy, chunk_tokens=7)
    literal_N, clipped_N = literal_loss(problem, policy)
    clipped_N = clipped_N & problem.tokens.mask_N
    assert 4 < clipped_N.sum() < 56
    assert torch.equal(losses.stats["ratio_clipped"], clipped_N.double())
    assert_agrees(losses, literal_N, problem, tolerance=1e-12)


def test_a_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    problem = stale_problem(0)
    plain, dual = (
        losses_of("sampled", problem, policy=PolicyOptions(ratio="ppo", ppo_dual_clip=bound)).loss_N
        for bound in (1e6, 1.5)
    )
    costs_N = losses_of("sampled", problem).loss_N
    assert (dual != plain).any()
    assert ((dual == plain) | (costs_N > 0)).all()
    assert (dual <= 1.5 * costs_N.clamp(min=0) + 1e-12).all()


def test_the_ratios_are_those_of_student_and_sampler_whatever_is_done_with_them() -> None:
    problem = stale_problem(0)
    expected_N = (problem.sampled(problem.log_p().detach()) - problem.tokens.sampler_logprobs_N).exp()
    expected_N = expected_N * problem.tokens.mask_N
    for ratio in ("none", "truncated", "ppo"):
        stats = losses_of("sampled", problem, policy=PolicyOptions(ratio=ratio)).stats
        torch.testing.assert_close(stats["ratio"], expected_N, rtol=0, atol=1e-12)
        torch.testing.assert_close(stats["ratio_squared"], expected_N.square(), rtol=0, atol=1e-12)
        assert (stats["ratio_clipped"].sum() == 0) == (ratio == "none")


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("ratio", ["none", "truncated", "ppo"])
def test_on_policy_every_ratio_is_one_and_changes_nothing(ratio: Any, top_p: float) -> None:
    problem = random_problem()
    policy = PolicyOptions(ratio=ratio, discount=0.9, top_p=top_p)
    logprobs_N = losses_of("sampled", problem, policy=policy).sampled_logprobs_N
    fresh = replace(problem, tokens=replace(problem.tokens, sampler_logprobs_N=logprobs_N))
    losses = losses_of("sampled", fresh, policy=policy)
    expected = losses_of("sampled", fresh, policy=replace(policy, ratio="none"))
    assert torch.equal(losses.stats["ratio"], torch.ones(11, dtype=torch.float64))
    assert losses.stats["ratio_clipped"].sum() == 0
    torch.testing.assert_close(losses.loss_N, expected.loss_N, rtol=0, atol=1e-12)
    for actual, plain in zip(*(torch.autograd.grad(x.loss, fresh.leaves()) for x in (losses, expected)), strict=True):
        torch.testing.assert_close(actual, plain, rtol=0, atol=1e-12)


def stale_enumeration() -> tuple[Enumeration, Tokens]:
    """Every sequence, weighted by its probability under an older student that sampled it."""
    problem, older = (enumerate_sequences(vocab_size=4, length=2, seed=seed) for seed in (0, 5))
    log_old_ST = (problem.table_CD + 0.3 * older.table_CD).detach() @ problem.head_VD.detach().T
    log_old_ST = log_old_ST.log_softmax(-1)[problem.contexts_ST, problem.ids_ST]
    tokens = replace(
        problem.tokens,
        weights_N=log_old_ST.sum(-1).exp()[:, None].expand(-1, 2).flatten(),
        sampler_logprobs_N=log_old_ST.flatten(),
    )
    return problem, tokens


def test_with_the_ratio_the_expected_gradient_over_a_stale_sampler_is_that_of_the_students_kl() -> None:
    """At discount 0, under a cap that is never met; the prefixes remain those of the sampler."""
    problem, tokens = stale_enumeration()
    log_p_CV = problem.log_p_CV()
    kl_C = (log_p_CV.exp() * (log_p_CV - problem.log_q_CV)).sum(-1)
    exact = problem.gradient((tokens.weights_N * kl_C[problem.contexts_ST].flatten()).sum())
    policy = PolicyOptions(ratio="truncated", ratio_cap=1e6)
    corrected = problem.losses("sampled", tokens=tokens, policy=policy)
    torch.testing.assert_close(problem.gradient(corrected.loss), exact, rtol=0, atol=1e-9)
    uncorrected = problem.losses("sampled", tokens=tokens)
    assert (problem.gradient(uncorrected.loss) - exact).norm() > 0.05
    mean_ratio = (tokens.weights_N * corrected.stats["ratio"]).sum() / 2
    torch.testing.assert_close(mean_ratio, torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_exact_divergences_need_no_ratio() -> None:
    """Their gradient at a prefix is the current student's, whoever sampled the token after it."""
    problem, tokens = stale_enumeration()
    for name, signal in (("full", problem.hidden_signal), ("support", problem.support_signal(3))):
        fresh, stale = (
            problem.losses(name, tokens=replace(tokens, sampler_logprobs_N=logprobs_N), signal=signal).loss_N
            for logprobs_N in (problem.tokens.sampler_logprobs_N, tokens.sampler_logprobs_N)
        )
        assert torch.equal(fresh, stale)
